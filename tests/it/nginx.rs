//! In front of nginx as Debian ships it, with its image filter, which knows nothing of the gate.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Child;

use image::{ImageFormat, Rgb, RgbImage};

use crate::support::{Folder, Setup, Token, eventually, get, nginx, request};

/// nginx, resizing real images; killed when dropped.
struct Nginx {
    process: Child,
    address: SocketAddr,
    folder: Folder,
}

impl Nginx {
    fn start() -> Self {
        let folder = Folder::new();
        std::fs::create_dir_all(folder.path("designs")).unwrap();
        paint(&folder.path("designs/poster"), ImageFormat::Png);
        paint(&folder.path("designs/photo"), ImageFormat::Jpeg);
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let root = folder.path("");
        let root = root.display();
        let config = format!(
            r#"
load_module /usr/lib/nginx/modules/ngx_http_image_filter_module.so;
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log {root}/access.log;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen {address};
        location ~ ^/v1/designs/(?<design>[a-z]+)/(download|autosave)$ {{
            root {root}/designs;
            try_files /$design =404;
            image_filter resize 120 90;
            image_filter_buffer 10M;
        }}
        location ~ ^/v1/designs/[a-z]+/export-screen$ {{
            default_type application/json;
            return 200 '{{"formats":["png"]}}';
        }}
        location ~ ^/v1/designs/[a-z]+$ {{
            default_type application/json;
            return 200 '{{"saved":true}}';
        }}
    }}
}}
"#
        );
        let process = nginx(&folder, address, &config);
        Self { process, address, folder }
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path(name)).unwrap_or_default()
    }

    /// How many requests for images it has answered.
    fn images_served(&self) -> usize {
        self.file("access.log")
            .lines()
            .filter(|line| line.contains("/download ") || line.contains("/autosave "))
            .count()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn paint(path: &Path, format: ImageFormat) {
    let picture = RgbImage::from_fn(640, 480, |x, y| Rgb([(x / 3) as u8, (y / 2) as u8, ((x * y) % 251) as u8]));
    picture.save_with_format(path, format).unwrap();
}

#[test]
fn images_are_byte_for_byte_those_of_nginx_and_counts_move_as_the_table_says() {
    let nginx = Nginx::start();
    let gate = Setup::before(nginx.address).start();
    for (design, kind, user) in [("poster", "image/png", "anna"), ("photo", "image/jpeg", "bert")] {
        let target = format!("/v1/designs/{design}/download");
        let direct = get(nginx.address, &target, &[]);
        assert_eq!((direct.status, direct.header("content-type")), (200, Some(kind)));
        let picture = image::load_from_memory(&direct.body).unwrap();
        assert_eq!((picture.width(), picture.height()), (120, 90), "nginx has resized it");
        let through = get(gate.address, &target, &[&Token::of(user).plan("pro").ai().line()]);
        assert_eq!((through.status, through.header("content-type")), (200, Some(kind)));
        assert!(through.body == direct.body, "{design}: not the same bytes");
        assert_eq!(gate.used(user, "ai-exports"), 1);
    }
    let missing = get(gate.address, "/v1/designs/nothing/download", &[&Token::of("anna").plan("pro").ai().line()]);
    assert_eq!(
        (missing.status, gate.used("anna", "ai-exports")),
        (415, 1),
        "what nginx says of no image is not charged"
    );
}

#[test]
fn the_third_ai_export_of_a_free_user_is_refused_never_arrives_and_stays_refused_after_a_restart() {
    let nginx = Nginx::start();
    let gate = Setup::before(nginx.address).start();
    let token = Token::of("anna").ai().line();
    let download = |address, status| {
        assert_eq!(get(address, "/v1/designs/poster/download", &[&token]).status, status);
    };
    download(gate.address, 200);
    download(gate.address, 200);
    eventually("nginx has logged both", || nginx.images_served() == 2);
    download(gate.address, 429);
    let gate = gate.restart();
    assert_eq!(gate.used("anna", "ai-exports"), 2);
    download(gate.address, 429);
    assert_eq!(request(gate.address, "PUT", "/v1/designs/poster", &[], b"{}").status, 200);
    eventually("nginx has logged the save", || nginx.file("access.log").contains("PUT /v1/designs/poster "));
    assert_eq!(nginx.images_served(), 2, "{}", nginx.file("access.log"));
}

#[test]
fn a_phone_opens_the_export_screen_once_and_saves_three_times_for_one_charge() {
    let nginx = Nginx::start();
    let gate = Setup::before(nginx.address).start();
    let token = Token::of("ben").ai().on("ios").line();
    assert_eq!(request(gate.address, "POST", "/v1/designs/photo/export-screen", &[&token], b"").status, 200);
    for _ in 0..3 {
        assert_eq!(get(gate.address, "/v1/designs/photo/autosave", &[&token]).status, 200);
    }
    assert_eq!(gate.used("ben", "ai-exports"), 1);
}

#[test]
fn a_conditional_request_that_nginx_answers_with_304_is_not_charged() {
    let nginx = Nginx::start();
    let gate = Setup::before(nginx.address).start();
    let token = Token::of("anna").ai().line();
    // The image filter drops validators, so the condition is met by the date of the file alone or not at all.
    let answer =
        get(gate.address, "/v1/designs/poster/download", &[&token, "if-modified-since: Fri, 01 Jan 2100 00:00:00 GMT"]);
    let expected = u64::from(answer.status == 200);
    assert_eq!(gate.used("anna", "ai-exports"), expected, "status {}", answer.status);
}
