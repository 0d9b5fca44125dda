//! To ask again until it is so.

use std::time::{Duration, Instant};

/// For some seconds: a client has its last byte, or has left, before the gate has put its things away. The last answer in any case.
pub(crate) async fn once<T>(ask: impl Fn() -> anyhow::Result<T>, is_so: impl Fn(&T) -> bool) -> anyhow::Result<T> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let began = Instant::now();
    loop {
        let answer = ask()?;
        if is_so(&answer) || began.elapsed() > PATIENCE {
            return Ok(answer);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
