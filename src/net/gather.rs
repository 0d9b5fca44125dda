//! Writing what lies in several places.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// What is no longer than this is put together first: to copy it takes less time than the kernel takes to look at several pieces.
const SMALL: usize = 2048;

/// Writes pieces, as [`AsyncWrite::poll_write_vectored`] does, in the cheapest way: of a head and a small body a single `send` is made.
pub(crate) fn write_pieces<IO>(
    stream: Pin<&mut IO>,
    cx: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>>
where
    IO: AsyncWrite + ?Sized,
{
    if let [only] = pieces {
        return stream.poll_write(cx, only);
    }
    let length = pieces.iter().map(|piece| piece.len()).sum();
    if length > SMALL {
        return stream.poll_write_vectored(cx, pieces);
    }
    let mut whole = [0; SMALL];
    let mut room = &mut whole[..];
    for piece in pieces {
        let (filled, rest) = room.split_at_mut(piece.len());
        filled.copy_from_slice(piece);
        room = rest;
    }
    stream.poll_write(cx, &whole[..length])
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;

    use super::*;

    /// What is written of pieces of these lengths to who takes so many bytes at once, and what arrives.
    async fn written(lengths: &[usize], taken: usize) -> (usize, Vec<u8>, Vec<u8>) {
        let pieces: Vec<Vec<u8>> = (1_u8..).zip(lengths).map(|(byte, length)| vec![byte; *length]).collect();
        let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let (mut ours, mut theirs) = tokio::io::duplex(taken);
        let count = poll_fn(|cx| write_pieces(Pin::new(&mut ours), cx, &slices)).await.unwrap();
        drop(ours);
        let mut arrived = Vec::new();
        theirs.read_to_end(&mut arrived).await.unwrap();
        (count, arrived, pieces.concat())
    }

    #[tokio::test]
    async fn what_arrives_is_a_beginning_of_all_pieces_and_as_long_as_was_said() {
        for lengths in
            [&[][..], &[7], &[5000], &[300, 1024], &[300, 0, 20], &[1024, 1024], &[1024, 1025], &[1, 5000], &[5000, 1]]
        {
            for taken in [1, 100, 2000, 100_000] {
                let (count, arrived, whole) = written(lengths, taken).await;
                assert_eq!(count, arrived.len(), "{lengths:?} {taken}");
                assert!(whole.starts_with(&arrived), "{lengths:?} {taken}");
                assert!(count > 0 || whole.is_empty(), "{lengths:?} {taken}");
            }
        }
        let (count, ..) = written(&[300, 1024], 100_000).await;
        assert_eq!(count, 1324, "all at once");
    }
}
