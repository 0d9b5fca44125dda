//! nginx as Debian ships it, handing one file out by TLS, in HTTP/1.1 and HTTP/2.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::{Folder, eventually};

/// A web server on `localhost`; killed when dropped.
pub(crate) struct WebServer {
    process: Child,
    pub(crate) port: u16,
    /// The root that its certificate comes from.
    pub(crate) ca_file: PathBuf,
    folder: Folder,
}

impl WebServer {
    pub(crate) fn with_tls(folder: &Folder, name: &str, content: &[u8]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        certify(folder);
        std::fs::write(folder.path(name), content).unwrap();
        let root = folder.path("");
        let root = root.display();
        let config = format!(
            r#"
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ worker_connections 64; }}
http {{
    log_format protocol "$server_protocol $request_method $uri $ssl_server_name";
    log_format number "$connection";
    access_log {root}/access.log protocol;
    access_log {root}/connections.log number;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl http2;
        listen [::1]:{port} ssl http2;
        ssl_certificate {root}/server.pem;
        ssl_certificate_key {root}/server.key;
        root {root};
    }}
}}
"#
        );
        let process = nginx(folder, SocketAddr::from(([127, 0, 0, 1], port)), &config);
        Self { process, port, ca_file: folder.path("ca.pem"), folder: folder.clone() }
    }

    /// Starts again with this in its configuration in place of that.
    pub(crate) fn restart_with(&mut self, old: &str, new: &str) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let config = std::fs::read_to_string(self.folder.path("nginx.conf")).unwrap().replace(old, new);
        self.process = nginx(&self.folder, SocketAddr::from(([127, 0, 0, 1], self.port)), &config);
    }

    /// By which of its connections each request came.
    pub(crate) fn connections(&self) -> Vec<String> {
        self.lines("connections.log")
    }

    /// What it was asked: protocol, method, path, and the name by which it was called as TLS began.
    pub(crate) fn log(&self) -> Vec<String> {
        self.lines("access.log")
    }

    fn lines(&self, name: &str) -> Vec<String> {
        std::fs::read_to_string(self.folder.path(name)).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

/// Starts nginx in a folder, and waits until it listens.
pub(crate) fn nginx(folder: &Folder, address: SocketAddr, config: &str) -> Child {
    std::fs::write(folder.path("nginx.conf"), config).unwrap();
    let mut process = Command::new("/usr/sbin/nginx")
        .arg("-c")
        .arg(folder.path("nginx.conf"))
        .arg("-p")
        .arg(folder.path(""))
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx is not installed: `tests/run` installs nginx and libnginx-mod-http-image-filter");
    eventually("nginx listens", || {
        let ended = process.try_wait().unwrap();
        assert!(ended.is_none(), "nginx has ended: {:?}", std::fs::read_to_string(folder.path("error.log")));
        std::net::TcpStream::connect(address).is_ok()
    });
    process
}

/// A root of its own, and a certificate for `localhost` by it.
pub(crate) fn certify(folder: &Folder) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    // Another name than the certificate's, or it looks as if that one had signed itself.
    params.distinguished_name.push(DnType::CommonName, "a root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &root).unwrap();
    std::fs::write(folder.path("ca.pem"), root.pem()).unwrap();
    std::fs::write(folder.path("server.pem"), certificate.pem()).unwrap();
    std::fs::write(folder.path("server.key"), key.serialize_pem()).unwrap();
}

impl Drop for WebServer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
