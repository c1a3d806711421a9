//! [`FrameReader`]: the same frames however a stream is cut up, made of its bytes and no others.

use bytes::Bytes;
use metanode_wire::{Frame, FrameError, FrameLimits, FrameReader, HEADER_BYTES, frame::VERSION};

use crate::script::Script;

/// `split count u8 | lengths of pieces less one u8… | which limits u8 | stream`
pub fn frames(data: &[u8]) {
    let mut script = Script::new(data);
    let count = usize::from(script.u8());
    let cuts = script.bytes(count);
    let limits = match script.u8() % 3 {
        0 => FrameLimits::default(),
        1 => metanode_admin_api::FRAME_LIMITS,
        _ => FrameLimits { head_bytes_max: 40, body_bytes_max: 20 },
    };
    let stream = Bytes::copy_from_slice(script.rest());
    let whole = read(limits, stream.clone(), &[]);
    let pieces = read(limits, stream.clone(), cuts);
    assert_eq!(whole.end, pieces.end, "how a stream ends does not depend on its pieces");
    assert_eq!(whole.frames.len(), pieces.frames.len(), "nor does the number of its frames");
    let mut at = 0;
    for (one, other) in whole.frames.iter().zip(&pieces.frames) {
        let header = &stream[at..at + HEADER_BYTES];
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let (head_bytes, body_bytes) = (word(8) as usize, word(12) as usize);
        assert!(head_bytes <= limits.head_bytes_max && body_bytes <= limits.body_bytes_max);
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
        assert_eq!((header[0], header[2], header[3]), (VERSION, 0, 0));
        assert_eq!((one.kind as u8, one.request), (header[1], word(4)));
        let body = at + HEADER_BYTES + head_bytes..at + HEADER_BYTES + head_bytes + body_bytes;
        assert_eq!(one.body, stream[body.clone()]);
        assert!(one.body.is_empty() || one.body.as_ptr() == stream[body.clone()].as_ptr(), "a copy");
        at = body.end;
    }
    if let End::Waiting { mid_frame, rest } = whole.end {
        assert_eq!(mid_frame, at < stream.len());
        // A reader that waits for a body has taken the header.
        let tail = &stream[at..];
        assert!(tail == rest || tail.get(HEADER_BYTES..) == Some(&rest[..]), "the rest is what was not framed");
    }
}

struct Read {
    frames: Vec<Frame>,
    end: End,
}

#[derive(Debug, PartialEq)]
enum End {
    Refused(FrameError),
    Waiting { mid_frame: bool, rest: Vec<u8> },
}

/// `cuts` are the lengths of pieces, less one, over and over; none: one piece.
fn read(limits: FrameLimits, mut stream: Bytes, cuts: &[u8]) -> Read {
    let mut reader = FrameReader::new(limits);
    let mut frames = Vec::new();
    let mut lengths = cuts.iter().cycle();
    loop {
        match reader.next_frame() {
            Ok(Some(frame)) => frames.push(frame),
            Err(error) => return Read { frames, end: End::Refused(error) },
            Ok(None) if stream.is_empty() => break,
            Ok(None) => {
                let length = lengths.next().map_or(stream.len(), |length| usize::from(*length) + 1);
                reader.push(stream.split_to(length.min(stream.len())));
            }
        }
    }
    let mid_frame = reader.is_mid_frame();
    let rest = reader.into_rest().iter().flatten().copied().collect();
    Read { frames, end: End::Waiting { mid_frame, rest } }
}
