//! Connections that leave HTTP: WebSockets by a real implementation on both sides, and other protocols byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use tungstenite::{Message, WebSocket};

use crate::support::{DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, read_until, stage};

const ROUTE: &str = "/v1/designs/d1/live";
const EXPORT: &str = DOWNLOAD;

/// A backend that echoes WebSocket messages until the client says good-bye, and then says so.
fn websocket_echo() -> (SocketAddr, Arc<Mutex<Vec<&'static str>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let ended: Arc<Mutex<Vec<&'static str>>> = Arc::default();
    let ends = ended.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let ends = ends.clone();
            std::thread::spawn(move || {
                let Ok(mut socket) = tungstenite::accept(stream) else { return };
                let ended = loop {
                    match socket.read() {
                        Ok(message @ (Message::Text(_) | Message::Binary(_))) => socket.send(message).unwrap(),
                        Ok(_) => {}
                        Err(tungstenite::Error::ConnectionClosed) => break "good-bye",
                        Err(_) => break "broken",
                    }
                };
                ends.lock().unwrap().push(ended);
            });
        }
    });
    (address, ended)
}

fn websocket(gate: &Gate) -> WebSocket<TcpStream> {
    let stream = TcpStream::connect(gate.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (socket, answer) = tungstenite::client(format!("ws://gate.test{ROUTE}"), stream).unwrap();
    assert_eq!(answer.status(), 101);
    socket
}

/// A backend that answers with these bytes, and then sends back what it is sent, and its end.
fn raw_echo(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                assert!(read_until(&mut stream, b"\r\n\r\n"));
                stream.write_all(answer.as_bytes()).unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                stream.write_all(b"all of it: ").unwrap();
                stream.write_all(&all).unwrap();
            });
        }
    });
    address
}

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo/1\r\n\r\n";

fn ask(gate: &Gate, target: &str, lines: &str) -> TcpStream {
    let mut stream = TcpStream::connect(gate.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nhost: gate.test\r\nconnection: upgrade\r\n{lines}\r\n").unwrap();
    stream
}

/// The first line of the answer; all else of its head is read.
fn status_line(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned()
}

fn open(gate: &Gate) -> f64 {
    gate.metric("exportgate_tunnels")
}

#[test]
fn a_websocket_goes_through_both_ways_however_large_its_messages() {
    let (backend, ended) = websocket_echo();
    let gate = Setup::before(backend).start();
    let mut socket = websocket(&gate);
    assert_eq!(open(&gate), 1.0);
    let large = vec![7; 5 << 20];
    for message in [Message::text("hello"), Message::binary(large), Message::text("")] {
        socket.send(message.clone()).unwrap();
        assert_eq!(socket.read().unwrap(), message);
    }
    socket.send(Message::Ping("are you there".into())).unwrap();
    assert_eq!(socket.read().unwrap(), Message::Pong("are you there".into()));
    socket.close(None).unwrap();
    while socket.read().is_ok() {}
    drop(socket);
    eventually("the backend hears the good-bye", || *ended.lock().unwrap() == ["good-bye"]);
    eventually("the tunnel is gone", || open(&gate) == 0.0);
    // Every request has one outcome, this one too.
    assert_eq!(gate.metric(r#"exportgate_requests_total{route="none",decision="forwarded",reason="unmatched"}"#), 1.0);
}

#[test]
fn either_side_may_end_while_the_other_goes_on() {
    let gate = Setup::before(raw_echo(SWITCH)).start();
    let mut stream = ask(&gate, "/live", "upgrade: echo/1\r\n");
    assert_eq!(status_line(&mut stream), "HTTP/1.1 101 Switching Protocols");
    stream.write_all(b"one, two").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "all of it: one, two");
}

#[test]
fn what_was_left_of_an_earlier_upload_takes_nothing_from_a_tunnel() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (hears, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert!(read_until(&mut stream, b"\r\n\r\n"));
        stream.write_all(SWITCH.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut piece = [0; 16];
        while let Ok(length @ 1..) = stream.read(&mut piece) {
            hears.send(piece[..length].to_vec()).unwrap();
        }
    });
    let gate = Setup::before(address).start();
    let mut stream = TcpStream::connect(gate.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // Refused, and its body read by nobody.
    write!(stream, "GET {EXPORT} HTTP/1.1\r\nhost: gate.test\r\ncontent-length: 4\r\n\r\nbody").unwrap();
    assert_eq!(status_line(&mut stream), "HTTP/1.1 401 Unauthorized");
    assert!(read_until(&mut stream, b"}"));
    write!(stream, "GET /live HTTP/1.1\r\nhost: gate.test\r\nconnection: upgrade\r\nupgrade: echo/1\r\n\r\n").unwrap();
    assert_eq!(status_line(&mut stream), "HTTP/1.1 101 Switching Protocols");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the backend says no more");
    for piece in [b"one", b"two"] {
        stream.write_all(piece).unwrap();
        assert_eq!(heard.recv_timeout(Duration::from_secs(30)).as_deref(), Ok(&piece[..]));
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(heard.recv_timeout(Duration::from_secs(30)), Err(mpsc::RecvTimeoutError::Disconnected), "its end, too");
}

#[test]
fn what_a_hasty_client_sends_before_the_answer_is_part_of_the_tunnel() {
    let gate = Setup::before(raw_echo(SWITCH)).start();
    let mut stream = ask(&gate, "/live", "upgrade: echo/1\r\n\r\nGET /v1/designs/d1/download HTTP/1.1");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(status_line(&mut stream), "HTTP/1.1 101 Switching Protocols");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    // The first line end of it ended the head.
    assert_eq!(rest, "all of it: GET /v1/designs/d1/download HTTP/1.1\r\n");
}

#[test]
fn a_backend_that_does_not_agree_gives_an_ordinary_answer_and_the_connection_goes_on() {
    let (backend, gate) = stage(Reply::with("426 Upgrade Required", &["content-type: text/plain"], b"no"));
    let mut stream = ask(&gate, "/live", "upgrade: websocket\r\n");
    assert_eq!(status_line(&mut stream), "HTTP/1.1 426 Upgrade Required");
    assert_eq!(backend.last().header("upgrade"), Some("websocket"));
    assert!(read_until(&mut stream, b"no"));
    write!(stream, "GET /next HTTP/1.1\r\nhost: gate.test\r\n\r\n").unwrap();
    assert_eq!(status_line(&mut stream), "HTTP/1.1 426 Upgrade Required");
    assert_eq!(backend.last().line, "GET /next HTTP/1.1");
}

#[test]
fn an_export_cannot_leave_http_and_so_not_leave_uncounted() {
    let (backend, gate) = stage(Reply::image());
    let token = format!("{}\r\nupgrade: websocket\r\n", Token::of("u").ai().line());
    let mut stream = ask(&gate, EXPORT, &token);
    assert_eq!(status_line(&mut stream), "HTTP/1.1 200 OK");
    assert_eq!((backend.last().header("upgrade"), backend.last().header("connection")), (None, None));
    eventually("it is counted", || gate.used("u", "ai-exports") == 1);
    // Nor by an answer that nobody asked for: what comes is no answer, and nothing is charged.
    backend.will(Reply::Raw(SWITCH.as_bytes().to_vec()));
    let answer = get(gate.address, EXPORT, &[&Token::of("other").ai().line()]);
    assert_eq!(answer.status, 502);
    assert_eq!(gate.used("other", "ai-exports"), 0);
}

#[test]
fn only_a_plain_wish_for_another_protocol_is_passed_on() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    let upgrade_of = |head: &str, body: &str| {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        write!(stream, "{head}\r\nhost: gate.test\r\n\r\n{body}").unwrap();
        assert!(status_line(&mut stream).contains("200"), "{head}");
        backend.last().header("upgrade").map(str::to_owned)
    };
    let plain = "GET /live HTTP/1.1\r\nconnection: keep-alive, Upgrade\r\nupgrade: WebSocket";
    assert_eq!(upgrade_of(plain, ""), Some("WebSocket".into()));
    for other in [
        "GET /live HTTP/1.1\r\nupgrade: websocket",
        "GET /live HTTP/1.0\r\nconnection: upgrade\r\nupgrade: websocket",
        "GET /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c",
        "GET /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket, h2c",
        "GET /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\nupgrade: h2c",
        "GET /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: HTTP/2.0",
    ] {
        assert_eq!(upgrade_of(other, ""), None, "{other}");
    }
    for with_body in ["GET", "POST"] {
        let head =
            format!("{with_body} /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\ncontent-length: 2");
        assert_eq!(upgrade_of(&head, "{}"), None, "{head}");
    }
}

#[test]
fn a_backend_that_goes_on_with_another_protocol_is_not_followed() {
    for answer in [
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ] {
        let gate = Setup::before(raw_echo(answer)).start();
        let mut stream = ask(&gate, "/live", "upgrade: echo/1\r\n");
        assert_eq!(status_line(&mut stream), "HTTP/1.1 502 Bad Gateway");
        assert_eq!(open(&gate), 0.0);
    }
}

#[test]
fn a_tunnel_through_which_nothing_goes_is_closed() {
    let gate = Setup::before(raw_echo(SWITCH)).set("EXPORT_GATE__SERVER__TUNNEL_IDLE_TIMEOUT", "300ms").start();
    let mut stream = ask(&gate, "/live", "upgrade: echo/1\r\n");
    assert_eq!(status_line(&mut stream), "HTTP/1.1 101 Switching Protocols");
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "closed");
    eventually("the tunnel is gone", || open(&gate) == 0.0);
}

#[test]
fn a_tunnel_keeps_its_place_among_connections_and_gives_it_back() {
    let (backend, _) = websocket_echo();
    let setup = Setup::before(backend).set("EXPORT_GATE__SERVER__MAX_CONNECTIONS_PER_ADDRESS", "1");
    let gate = setup.start();
    let socket = websocket(&gate);
    let mut second = TcpStream::connect(gate.address).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_or(0), 0, "one too many");
    drop(socket);
    eventually("there is a place again", || {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        // A connection that waits for its first request has a place.
        stream.read(&mut [0]).is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    });
}

#[test]
fn a_reload_touches_no_tunnel_and_the_end_waits_for_it_as_long_as_it_may() {
    let (backend, ended) = websocket_echo();
    let gate = Setup::before(backend).set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "300ms").start();
    let mut socket = websocket(&gate);
    let path = gate.setup.config();
    let text = std::fs::read_to_string(&path).unwrap().replace("pro = 30", "pro = 31");
    std::fs::write(&path, text).unwrap();
    let generation = gate.metric("exportgate_config_generation");
    gate.signal("HUP");
    eventually("it is taken over", || gate.metric("exportgate_config_generation") > generation);
    socket.send(Message::text("still here")).unwrap();
    assert_eq!(socket.read().unwrap(), Message::text("still here"));
    assert!(gate.stop().success(), "a tunnel that does not end is no failure");
    assert!(socket.read().is_err());
    eventually("the backend hears of it", || *ended.lock().unwrap() == ["broken"]);
}
