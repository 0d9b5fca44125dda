//! What `config/deploy` has to offer, as far as it can be tried without a service manager and without a container engine.

use std::collections::BTreeSet;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::support::{Backend, DOWNLOAD, Folder, Reply, Setup, Token, eventually, get};

fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(repository(name)).unwrap()
}

/// Runs a tool of systemd, which works without one that runs.
fn systemd_analyze(arguments: &[&str]) -> Output {
    let output = Command::new("systemd-analyze").args(arguments).env("SYSTEMD_PAGER", "").output();
    output.expect("systemd-analyze is not installed: `tests/run` installs systemd")
}

/// The unit as it stands, with the binary where it is.
fn unit(folder: &Folder) -> String {
    let text = read("config/deploy/export-gate.service");
    let text = text.replace("/usr/local/bin/export-gate", env!("CARGO_BIN_EXE_export-gate"));
    let path = folder.path("export-gate.service");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn the_systemd_unit_is_valid_and_exposes_little() {
    let folder = Folder::new();
    let unit = unit(&folder);
    let verified = systemd_analyze(&["verify", "--man=no", &unit]);
    let complaints = String::from_utf8_lossy(&verified.stderr);
    // Other units of the machine are none of ours.
    let ours: Vec<&str> = complaints.lines().filter(|line| line.contains("export-gate")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{complaints}");
    // From 0 (nothing) to 100.
    let judged = systemd_analyze(&["security", "--offline=true", "--threshold=12", &unit]);
    assert!(judged.status.success(), "{}", String::from_utf8_lossy(&judged.stdout));
}

/// All system calls of a set, and of the sets in it.
fn system_calls(set: &str) -> BTreeSet<String> {
    let output = systemd_analyze(&["syscall-filter", set]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with(set), "{set}: {text}");
    let lines = text.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(|line| if line.starts_with('@') { system_calls(line) } else { [line.to_owned()].into() }).collect()
}

#[test]
fn the_units_filter_lets_the_gate_make_all_its_system_calls() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let folder = setup.folder.clone();
    let path = folder.path("trace");
    let gate = setup.traced(&["-o", &path.display().to_string()]).start();
    let process = gate.pid().to_string();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    assert_eq!(get(gate.address, "/elsewhere", &[]).status, 200);
    assert!(gate.stop().success());
    let mut trace = String::new();
    eventually("the trace is complete", || {
        trace = std::fs::read_to_string(&path).unwrap();
        trace.lines().any(|line| line.starts_with(&process) && line.ends_with("+++ exited with 0 +++"))
    });
    let names = trace.lines().filter_map(|line| {
        let call = line.split_once(' ')?.1.trim_start();
        Some(call.strip_prefix("<... ").unwrap_or(call).split(['(', ' ']).next()?.to_owned())
    });
    let is_name =
        |name: &String| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let mut made: BTreeSet<String> = names.filter(|name| is_name(name) && !name.is_empty()).collect();
    assert!(made.contains("fdatasync") && made.contains("accept4"), "{made:?}");
    // SQLite's, and root's only: in the unit the gate is not root.
    made.remove("fchown");
    let mut allowed = system_calls("@system-service");
    for denied in ["@privileged", "@resources"] {
        let denied = system_calls(denied);
        allowed.retain(|call| !denied.contains(call));
    }
    let refused: Vec<&String> = made.difference(&allowed).collect();
    assert!(refused.is_empty(), "{refused:?}");
    let unit = read("config/deploy/export-gate.service");
    assert!(unit.contains("SystemCallFilter=@system-service\nSystemCallFilter=~@privileged @resources\n"));
}

/// What the gate tells, until it says this.
fn told(manager: &UnixDatagram, until: &str) -> Vec<String> {
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut told = Vec::new();
    loop {
        let mut message = [0; 1_024];
        let length = manager.recv(&mut message).unwrap_or_else(|error| panic!("no {until}: {error}, only {told:?}"));
        let message = std::str::from_utf8(&message[..length]).unwrap();
        told.extend(message.lines().map(str::to_owned));
        if message.lines().any(|line| line == until) {
            return told;
        }
    }
}

fn tells_its_manager(name: &str, manager: &UnixDatagram) {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address).set("NOTIFY_SOCKET", name).set("WATCHDOG_USEC", "40000");
    let gate = setup.start_unready();
    let at_first = told(manager, "READY=1");
    assert!(
        at_first.contains(&format!("STATUS=Listening on {}, for operators on {}", gate.address, gate.admin_address))
    );
    for _ in 0..3 {
        told(manager, "WATCHDOG=1");
    }
    gate.signal("TERM");
    told(manager, "STOPPING=1");
    assert_eq!(gate.stop_code(), Some(0));
}

#[test]
fn the_service_manager_is_told_of_the_start_the_end_and_signs_of_life() {
    let folder = Folder::new();
    let path = folder.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    tells_its_manager(path.to_str().unwrap(), &manager);
}

#[test]
#[cfg(target_os = "linux")]
fn a_service_manager_may_listen_on_a_name_that_is_in_no_file_system() {
    let name = format!("export-gate-test-{}", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    tells_its_manager(&format!("@{name}"), &manager);
}

#[test]
fn a_watchdog_of_another_process_and_a_manager_that_is_gone_are_no_trouble() {
    let folder = Folder::new();
    let path = folder.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address).set("NOTIFY_SOCKET", path.to_str().unwrap());
    let setup = setup.set("WATCHDOG_USEC", "1000").set("WATCHDOG_PID", "1");
    let gate = setup.start();
    gate.signal("TERM");
    let told = told(&manager, "STOPPING=1");
    assert!(!told.contains(&"WATCHDOG=1".to_owned()), "{told:?}");
    assert_eq!(gate.stop_code(), Some(0));
    drop(manager);
    let gate = setup.start();
    assert_eq!(get(gate.address, "/elsewhere", &[]).status, 200);
    assert!(gate.stop().success());
}

#[test]
fn the_health_command_says_by_its_exit_code_whether_a_gate_forwards_and_charges() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let health = |admin: &str, more: &[&str]| {
        let output = setup.command("health").args(["--admin", admin]).args(more).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let gate = setup.start();
    let admin = gate.admin_address.to_string();
    assert_eq!(health(&admin, &[]), (Some(0), "{\"healthy\":true}\n".into()));
    assert_eq!(health(&admin, &["--ready"]), (Some(0), "{\"ready\":true}\n".into()));
    // Another server may well answer 200.
    for other in [gate.address, backend.address] {
        let (code, said) = health(&other.to_string(), &[]);
        assert!(code == Some(1) && said.contains("no admin listener"), "{said}");
    }
    assert!(gate.stop().success());
    let (code, said) = health(&admin, &[]);
    assert!(code == Some(1) && said.contains("cannot connect"), "{said}");
    // A ledger that is none: it forwards, and cannot charge.
    std::fs::write(setup.folder.path("export-gate.db"), "no ledger").unwrap();
    let gate = setup.start_unready();
    let admin = gate.admin_address.to_string();
    assert_eq!(health(&admin, &[]).0, Some(0));
    let (code, said) = health(&admin, &["--ready"]);
    assert!(code == Some(1) && said.contains("503 Service Unavailable: {\"ready\":false"), "{said}");
}

#[test]
fn a_build_for_deployment_says_what_it_lacks() {
    let tools = Folder::new();
    for tool in ["bash", "chmod", "dirname", "env", "mktemp", "rm"] {
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(tool), tools.path(tool)).unwrap();
    }
    let desk = Folder::new();
    let mut build = Command::new(repository("config/deploy/build"));
    let lacking = build.env("PATH", tools.path("")).env("TMPDIR", desk.path("")).output().unwrap();
    assert!(!lacking.status.success() && lacking.stdout.is_empty());
    let said = String::from_utf8_lossy(&lacking.stderr).into_owned();
    let packages = said.strip_prefix("error: h2load is missing: apt install ").unwrap_or_else(|| panic!("{said}"));
    assert!(std::fs::read_dir(desk.path("")).unwrap().next().is_none(), "it leaves nothing behind");
    // Where the container image is built, they are installed.
    let instructions = instructions(&read("config/deploy/Dockerfile"));
    let installed = instructions.iter().find(|(name, rest)| name == "RUN" && rest.contains("apt-get install"));
    assert!(installed.unwrap().1.contains(packages.trim()), "{packages}");
}

/// The instructions of a Dockerfile: name and arguments, continued lines joined.
fn instructions(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let lines = joined.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| line.split_once(' ').unwrap()).map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect()
}

#[test]
fn the_container_image_is_built_from_what_is_there_and_runs_as_nobody() {
    let instructions = instructions(&read("config/deploy/Dockerfile"));
    let all = |name: &'static str| instructions.iter().filter(move |(known, _)| known == name).map(|(_, rest)| &**rest);
    let last = |name: &'static str| all(name).next_back().unwrap_or_else(|| panic!("no {name}"));

    // Images with a tag, and without a host: whoever builds says where from.
    let runtime = last("ARG").strip_prefix("RUNTIME=").unwrap();
    let images: Vec<&str> = all("FROM")
        .map(|from| from.split(' ').next().unwrap())
        .map(|image| if image == "${RUNTIME}" { runtime } else { image })
        .collect();
    assert_eq!(images.len(), 2);
    for image in &images {
        let (name, tag) = image.split_once(':').unwrap_or_else(|| panic!("{image} has no tag"));
        assert!(
            !name.contains(['.', '/', ':']) && tag.starts_with(char::is_alphanumeric) && tag != "latest",
            "{image}"
        );
    }
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let rust = manifest["package"]["rust-version"].as_str().unwrap();
    assert!(images[0].starts_with(&format!("rust:{rust}")), "{} is not the Rust of Cargo.toml", images[0]);

    // What is copied is there, is let through by the ignore file, and is all that the package needs to be read.
    let ignore = read("config/deploy/Dockerfile.dockerignore");
    let allowed: BTreeSet<&str> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    let mut copied = BTreeSet::new();
    for words in
        all("COPY").filter(|words| !words.contains("--from=")).map(|words| words.split(' ').collect::<Vec<_>>())
    {
        let (_, sources) = words.split_last().unwrap();
        copied.extend(sources.to_vec());
    }
    assert_eq!(copied, allowed);
    let context = Folder::new();
    for source in copied {
        std::fs::create_dir_all(context.path(source).parent().unwrap()).unwrap();
        let status = Command::new("cp").arg("-r").arg(repository(source)).arg(context.path(source)).status();
        assert!(status.unwrap().success(), "{source}");
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--locked", "--offline", "--no-deps", "--format-version=1"]).current_dir(context.path(""));
    let read_by_cargo = cargo.output().unwrap();
    assert!(read_by_cargo.status.success(), "{}", String::from_utf8_lossy(&read_by_cargo.stderr));

    let (user, group) = last("USER").split_once(':').unwrap();
    assert!(
        [user, group].iter().all(|id| id.parse::<u32>().unwrap() >= 1_000),
        "a number, so that it needs no /etc/passwd"
    );
    let state = all("COPY").find(|words| words.contains(&format!("--chown={user}:{group} "))).unwrap();
    assert!(state.ends_with(last("VOLUME")) && last("ENV").contains(last("VOLUME")), "the ledger is in the volume");
    // No shell: the arguments are JSON, and the commands are ours.
    let entry: Vec<String> = serde_json::from_str(last("ENTRYPOINT")).unwrap();
    let command: Vec<String> = serde_json::from_str(last("CMD")).unwrap();
    let health: Vec<String> = serde_json::from_str(last("HEALTHCHECK").split_once("CMD ").unwrap().1).unwrap();
    assert_eq!(health[..entry.len()], entry);
    for name in [&command[0], &health[entry.len()]] {
        let help = Command::new(env!("CARGO_BIN_EXE_export-gate")).args([name, "--help"]).output().unwrap();
        assert!(help.status.success(), "{name}");
    }
}
