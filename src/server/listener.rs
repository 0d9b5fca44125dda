//! Accepts connections, while there is room for them, until the gate is to end.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinError, JoinSet};

use super::connection::{self, Common};
use super::places::{Place, Places};

/// How long to wait before accepting again when the machine has no more file descriptors.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How many clients may wait to be accepted, if the system lets as many (`net.core.somaxconn`). Others are not heard, and ask again after a
/// second: 128, as it is by default, are soon there when all come back at once.
const BACKLOG: u32 = 4_096;

/// How often it is told that no connection can be accepted.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// How much of its answer the system may keep for a client, in bytes, beyond what is on its way. It says that there is room once half of
/// that has gone: what a client has to take for it to be seen that it takes something. Otherwise that is a third of a buffer of megabytes,
/// which takes a slow client longer than it is waited for.
const UNSENT: u32 = 256 * 1024;

/// Listens at an address.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // One that has just ended does not stand in the way.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts and serves connections until `shutdown`; then lets requests end, for as long as `patience` lasts. With the last connection, every
/// charge has ended.
pub(super) async fn serve(
    listener: TcpListener,
    places: Places,
    common: Arc<Common>,
    shutdown: impl Future<Output = ()>,
    patience: impl Future<Output = ()>,
) {
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let (mut told, mut told_of_places) = (None, None);
    loop {
        if places.are_taken() && is_time(&mut told_of_places, &common) {
            tracing::warn!(
                "as many connections as may be are open: who connects waits for a place (server.max_connections)"
            );
        }
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((socket, from, Some(place))) => {
                connections.spawn(connection::serve(common.clone(), socket, from, place));
            }
            Ok((_, from, None)) => tracing::debug!(peer = %from.ip(), "too many connections from there"),
            Err(error) => {
                if is_time(&mut told, &common) {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // Who has connected already need not connect again.
    loop {
        tokio::select! {
            biased;
            accepted = accept(&listener, &places) => match accepted {
                Ok((socket, from, Some(place))) => {
                    connections.spawn(connection::serve(common.clone(), socket, from, place));
                }
                // Others wait behind it.
                Ok((_, _, None)) => {}
                Err(_) => break,
            },
            () = std::future::ready(()) => break,
        }
    }
    drop(listener);
    tracing::info!(connections = connections.len(), "ending: no new connections, requests under way may end");
    common.ending.cancel();
    let ended = async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    };
    let in_time = tokio::select! {
        () = ended => true,
        () = patience => false,
    };
    if !in_time {
        tracing::warn!(connections = connections.len(), "requests under way did not end in time and are cut off");
    }
    // Cutting a connection off drops its charges, which settles them or leaves them to be owed; those of HTTP/2 are its streams'.
    connections.shutdown().await;
    common.streams.ended().await;
}

/// Whether something was not told for a while.
fn is_time(told: &mut Option<Duration>, common: &Common) -> bool {
    let now = common.clock.coarse();
    let is_time = told.is_none_or(|told| now.saturating_sub(told) >= TELL_INTERVAL);
    if is_time {
        *told = Some(now);
    }
    is_time
}

/// The next connection, once there is a place for one; its place is `None` if its address has too many.
async fn accept(listener: &TcpListener, places: &Places) -> io::Result<(TcpStream, SocketAddr, Option<Place>)> {
    let free = places.free().await;
    let (socket, from) = listener.accept().await?;
    if let Err(error) = socket.set_nodelay(true).and_then(|()| SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT)) {
        tracing::debug!(%error, "cannot set TCP_NODELAY and TCP_NOTSENT_LOWAT");
    }
    Ok((socket, from, places.take(free, from.ip())))
}

fn report(ended: Result<(), JoinError>) {
    if let Err(died) = ended {
        tracing::error!(error = %died, "a connection's task died");
    }
}
