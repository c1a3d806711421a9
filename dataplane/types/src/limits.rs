//! Every bound of the data plane that is not configurable, with its reason. Configurable ones live in the node's
//! configuration, whose defaults name the constants here.

/// Most shards a node can run: the log number in an index entry and on disk has 16 bits, and no machine we know has more cores.
pub const SHARDS_MAX: u16 = 1024;

/// Bytes of one chunk: 16 groups of a bao tree, and the unit in which large blobs are stored, read and forwarded. Large enough
/// that per-chunk work vanishes, small enough that a window of 16 is 4 MiB.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Bytes of one verifiable group (bao's chunk group, log2 = 4): one AVX-512 BLAKE3 batch; 0.4 % of tree overhead.
pub const GROUP_BYTES: usize = 16 * 1024;

/// Chunks of one extent, the unit of a large blob's map: 64 MiB of data, whose page (hashes and tree) is below 272 KiB.
pub const EXTENT_CHUNKS: usize = 256;

/// Bytes of data in one full extent.
pub const EXTENT_BYTES: u64 = (EXTENT_CHUNKS * CHUNK_BYTES) as u64;

/// Extents of one blob: its root record stays under 4 MiB, so it fits one commit frame. 65,535 × 64 MiB ≈ 4 TiB.
pub const EXTENTS_MAX: usize = 65_535;

/// Largest blob in bytes, from [`EXTENTS_MAX`].
pub const BLOB_BYTES_MAX: u64 = EXTENTS_MAX as u64 * EXTENT_BYTES;

/// Largest archive of one frame: a page of a listing is the largest there is.
pub const FRAME_HEAD_BYTES_MAX: usize = 64 * 1024;

/// Largest bulk part of one frame: one chunk.
pub const FRAME_BODY_BYTES_MAX: usize = CHUNK_BYTES;

/// Longest tag name in bytes: as file systems have it.
pub const TAG_NAME_BYTES_MAX: usize = 255;

/// Entries of a folder manifest. A million files is what one archive of sources or logs reaches; their manifest is ~100 MiB.
pub const MANIFEST_ENTRIES_MAX: usize = 1_000_000;

/// Bytes of a path in a manifest: Linux's PATH_MAX.
pub const MANIFEST_PATH_BYTES_MAX: usize = 4096;

/// Depth of a path in a manifest: deeper trees exceed PATH_MAX once they are placed somewhere.
pub const MANIFEST_DEPTH_MAX: usize = 128;

/// Bytes of a whole manifest: what a client holds in memory while it writes or reads a folder.
pub const MANIFEST_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// Entries in one page of a listing, so that a page fits [`FRAME_HEAD_BYTES_MAX`] with the longest names.
pub const LIST_PAGE_MAX: usize = 128;

/// Chunks that one request asks about: their names, 32 KiB, fit [`FRAME_HEAD_BYTES_MAX`].
pub const HAVE_CHUNKS_MAX: usize = 1024;

/// Transactions in one request: their refusals fit [`FRAME_HEAD_BYTES_MAX`], and checking them takes a few hundredths of a second.
pub const SUBMIT_TRANSACTIONS_MAX: usize = 1024;

/// Addresses in a ticket: one per family and interface of a usual host; keeps a ticket on one line.
pub const TICKET_ADDRESSES_MAX: usize = 8;

/// Bytes of the explanation in a refusal: a sentence, not a log.
pub const REFUSAL_DETAIL_BYTES_MAX: usize = 512;
