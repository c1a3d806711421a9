//! Opening, writing, and taking turns between the two files.

use std::{
    cell::{Cell, RefCell},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use metanode_shard::{
    Companion,
    file::{AlignedBuffer, LogFile},
    fs::{self, PlainFile},
};

use crate::{
    format::{self, BLOCK, FRAME_HEADER, Generation, Header, Scan},
    signer::SignState,
};

/// Bytes of each of the two files: thousands of usual heights.
pub const FILE_BYTES: u64 = 8 << 20;

/// Fewer make no sense: a header and some frames with blocks.
pub const FILE_BYTES_MIN: u64 = 64 << 10;

/// Memory that is kept to lay out the next frame in.
const BUFFER_BYTES_KEPT: usize = 256 << 10;

/// Why a sign state can't be used, or not any more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WalError {
    /// The operating system says so.
    #[error("can't {what} {}: {error}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: Arc<io::Error>,
    },
    /// Another process signs with it.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// It is another chain's or another key's.
    #[error("{} is the sign state of another chain or key", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// By a later version of this program.
    #[error("{} has version {version} of the format; this program knows version {}", path.display(), format::MAGIC[7])]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u8,
    },
    /// What was said is not known.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// More than there is room for; [`Wal::restart`] with what is still needed makes room.
    #[error("a frame of {bytes} bytes does not fit into the {room} bytes that are left")]
    Full {
        /// Wanted.
        bytes: u64,
        /// There.
        room: u64,
    },
    /// An earlier write failed. Whether the disk has what it was is not known before a restart.
    #[error("an earlier write of the sign state failed; nothing is signed before a restart")]
    Failed,
}

pub(crate) fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> WalError + use<'a> {
    move |error| WalError::Io { what, path: path.to_owned(), error: Arc::new(error) }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// In their order; see [`is_new`](Self::is_new).
    pub records: Vec<Vec<u8>>,
    /// Nothing was there: this key has never signed, or it is not known what.
    pub is_new: bool,
    /// A write that a crash cut off was dropped.
    pub torn: bool,
}

/// The sign state of one validator, on its shard.
#[derive(Debug)]
pub struct Wal {
    state: Arc<SignState>,
    file_bytes: u64,
    companion: Companion,
    place: Cell<Place>,
    file: RefCell<Arc<LogFile>>,
    buffer: RefCell<AlignedBuffer>,
    is_failed: Cell<bool>,
}

/// Where the next frame goes.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Which of the two files.
    turn: usize,
    generation: Generation,
    offset: u64,
    sequence: u64,
}

/// An open sign state that no shard has yet.
#[derive(Debug)]
pub struct Opening {
    state: SignState,
    file_bytes: u64,
    place: Place,
}

fn path_of(folder: &Path, turn: usize) -> PathBuf {
    folder.join(format!("sign-{turn}.wal"))
}

/// Opens a sign state, or begins one. Waits for the disk: to be called before the shards start, or where waiting is allowed;
/// [`Wal::start`] then takes it to its shard.
pub fn open(state: SignState, file_bytes: u64) -> Result<(Opening, Opened), WalError> {
    let file_bytes = file_bytes.max(FILE_BYTES_MIN).next_multiple_of(BLOCK as u64);
    let folder = state.folder().to_owned();
    let mut files = Vec::new();
    for turn in 0..2 {
        let path = path_of(&folder, turn);
        if !fs::exists(&path) {
            make_file(&folder, turn, file_bytes).map_err(failed("make", &path))?;
        }
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let generation = match format::decode_header(&bytes) {
            Header::OtherVersion(version) => return Err(WalError::OtherVersion { path, version }),
            Header::Valid { owner, .. } if owner != state.owner() => return Err(WalError::Foreign { path }),
            Header::Valid { generation, .. } => Some(generation),
            Header::Empty | Header::Bad => None,
        };
        files.push(Found { path, bytes, generation });
    }
    match truth(&files)? {
        Some((turn, generation, scan)) => {
            // The other one is not the truth: it must not look like it if this one is lost one day.
            let other = files[1 - turn].generation.is_some_and(|other| other.number > generation.number);
            if other {
                wipe(&files[1 - turn].path, 0..BLOCK as u64)?;
            }
            if scan.torn {
                wipe(&files[turn].path, scan.end..files[turn].bytes.len() as u64)?;
            }
            let place = Place { turn, generation, offset: scan.end, sequence: scan.sequence };
            let is_new = generation.number == 1 && scan.records.is_empty();
            Ok((Opening { state, file_bytes, place }, Opened { records: scan.records, is_new, torn: scan.torn }))
        }
        None => {
            let generation = Generation { number: 1, salt: salt(&files[0].path)? };
            let place = begin(&state, 0, generation, &[])?;
            Ok((Opening { state, file_bytes, place }, Opened { records: Vec::new(), is_new: true, torn: false }))
        }
    }
}

/// Begins a sign state with these records, where there is none. As [`open`], it waits for the disk.
pub fn create(state: SignState, file_bytes: u64, records: &[Vec<u8>]) -> Result<(), WalError> {
    let (Opening { state, place, .. }, opened) = open(state, file_bytes)?;
    if !opened.is_new {
        let path = path_of(state.folder(), place.turn);
        return Err(WalError::Damaged { path, what: "there is a sign state already".to_owned() });
    }
    begin(&state, place.turn, place.generation, records).map(|_| ())
}

/// One of the two files, as it is found.
struct Found {
    path: PathBuf,
    bytes: Vec<u8>,
    /// If its header checks.
    generation: Option<Generation>,
}

impl Found {
    fn is_empty(&self) -> bool {
        format::decode_header(&self.bytes) == Header::Empty
    }

    fn damaged(&self, what: &str) -> WalError {
        WalError::Damaged { path: self.path.clone(), what: what.to_owned() }
    }

    fn scan(&self, generation: Generation) -> Result<Scan, WalError> {
        format::scan(&self.bytes, generation).map_err(|rot| self.damaged(&rot.to_string()))
    }
}

/// Which of the files says what was said last; `None` when nothing was ever begun.
fn truth(files: &[Found]) -> Result<Option<(usize, Generation, Scan)>, WalError> {
    let mut valid: Vec<(usize, Generation)> =
        files.iter().enumerate().filter_map(|(turn, file)| Some((turn, file.generation?))).collect();
    valid.sort_by_key(|(_, generation)| std::cmp::Reverse(generation.number));
    match valid[..] {
        [] => match files.iter().find(|file| !file.is_empty()) {
            Some(file) => Err(file.damaged("its header does not check, and there is no other")),
            None => Ok(None),
        },
        [(turn, generation)] => {
            let scan = files[turn].scan(generation)?;
            if scan.superseded {
                return Err(files[1 - turn].damaged("its header does not check, and it was the newer one"));
            }
            Ok(Some((turn, generation, scan)))
        }
        [(newer, newest), (older, before), ..] => {
            let scan = files[older].scan(before)?;
            if !scan.superseded {
                return Ok(Some((older, before, scan))); // the turn was not over when a crash came
            }
            let scan = files[newer].scan(newest)?;
            if scan.superseded || scan.sequence == 1 {
                return Err(files[newer].damaged("it was begun, and its first record does not check"));
            }
            Ok(Some((newer, newest, scan)))
        }
    }
}

fn salt(path: &Path) -> Result<u64, WalError> {
    let mut salt = [0; 8];
    metanode_shard::fill_random(&mut salt).map_err(failed("draw a number for", path))?;
    Ok(u64::from_le_bytes(salt))
}

/// Makes a file of zeros. Zeros that were written, since writes over blocks that never were take two and a half times as long to sync.
fn make_file(folder: &Path, turn: usize, bytes: u64) -> io::Result<()> {
    let (path, filling) = (path_of(folder, turn), folder.join(format!("sign-{turn}.new")));
    let file = PlainFile::create(&filling)?;
    file.allocate(bytes)?;
    let zeros = vec![0; FILL_BYTES];
    let mut at = 0;
    while at < bytes {
        let piece = zeros.len().min((bytes - at) as usize);
        file.write_at(&zeros[..piece], at)?;
        at += piece as u64;
    }
    file.sync()?;
    fs::rename(&filling, &path)?;
    fs::sync_folder(folder)
}

/// Bytes of one write of [`make_file`].
const FILL_BYTES: usize = 256 << 10;

/// Puts zeros over what is not the truth.
fn wipe(path: &Path, range: std::ops::Range<u64>) -> Result<(), WalError> {
    let wipe = || {
        let file = PlainFile::open_for_change(path)?;
        file.write_at(&vec![0; (range.end - range.start) as usize], range.start)?;
        file.sync()
    };
    wipe().map_err(failed("clean", path))
}

/// Begins a generation: header and first frame, synced.
fn begin(state: &SignState, turn: usize, generation: Generation, records: &[Vec<u8>]) -> Result<Place, WalError> {
    let path = path_of(state.folder(), turn);
    let mut bytes = format::encode_header(&state.owner(), generation).to_vec();
    bytes.extend(format::encode_records(generation, BLOCK as u64, 1, records));
    let write = || {
        let file = PlainFile::open_for_change(&path)?;
        // An earlier generation's header over the frames of this one would look like damage.
        file.write_at(&[0; BLOCK], 0)?;
        file.sync()?;
        file.write_at(&bytes, 0)?;
        file.sync()
    };
    write().map_err(failed("write", &path))?;
    Ok(Place { turn, generation, offset: bytes.len() as u64, sequence: 2 })
}

impl Wal {
    /// Takes an open sign state to this shard.
    pub fn start(opening: Opening) -> Result<Self, WalError> {
        let Opening { state, file_bytes, place } = opening;
        let path = path_of(state.folder(), place.turn);
        let companion = Companion::start("sign", 1).map_err(failed("start a thread for", &path))?;
        let file = LogFile::open(&path).map_err(failed("open", &path))?;
        Ok(Self {
            state: Arc::new(state),
            file_bytes,
            companion,
            place: Cell::new(place),
            file: RefCell::new(Arc::new(file)),
            buffer: RefCell::default(),
            is_failed: Cell::new(false),
        })
    }

    /// The right to sign.
    pub fn sign_state(&self) -> &SignState {
        &self.state
    }

    /// Bytes of records that surely fit into one more [`append`](Self::append); of each, its length and four.
    pub fn room_bytes(&self) -> u64 {
        // A block is kept for the frame that supersedes this generation.
        let end = self.file_bytes - BLOCK as u64;
        (end.saturating_sub(self.place.get().offset)).saturating_sub(FRAME_HEADER as u64)
    }

    /// Puts records on disk, all or none. One call at a time: the next begins when this has returned.
    pub async fn append(&self, records: &[Vec<u8>]) -> Result<(), WalError> {
        if self.is_failed.get() {
            return Err(WalError::Failed);
        }
        let place = self.place.get();
        let bytes = format::frame_bytes(records.iter().map(Vec::len));
        let room = (self.file_bytes - BLOCK as u64).saturating_sub(place.offset);
        if bytes > room {
            return Err(WalError::Full { bytes, room });
        }
        let frame = format::encode_records(place.generation, place.offset, place.sequence, records);
        self.write(place, frame).await?;
        self.place.set(Place { offset: place.offset + bytes, sequence: place.sequence + 1, ..place });
        Ok(())
    }

    async fn write(&self, place: Place, frame: Vec<u8>) -> Result<(), WalError> {
        let (file, mut buffer) = (self.file.borrow().clone(), self.buffer.take());
        self.is_failed.set(true); // until it is known to be there; a caller that gives up does not know
        let job = move || {
            buffer.clear(BUFFER_BYTES_KEPT);
            buffer.extend_from_slice(&frame);
            let result = file.write_at(&buffer, place.offset).and_then(|()| file.fdatasync());
            (buffer, result)
        };
        let (buffer, result) = self.companion.run(job).await;
        self.buffer.replace(buffer);
        let path = path_of(self.state.folder(), place.turn);
        result.map_err(failed("write", &path))?;
        self.is_failed.set(false);
        Ok(())
    }

    /// Goes on in the other file, with these records in place of all that were appended: what is still needed of them.
    pub async fn restart(&self, records: Vec<Vec<u8>>) -> Result<(), WalError> {
        if self.is_failed.get() {
            return Err(WalError::Failed);
        }
        let before = self.place.get();
        let bytes = BLOCK as u64 + format::frame_bytes(records.iter().map(Vec::len));
        let room = self.file_bytes - BLOCK as u64;
        if bytes > room {
            return Err(WalError::Full { bytes, room });
        }
        let turn = 1 - before.turn;
        let path = path_of(self.state.folder(), turn);
        let generation = Generation { number: before.generation.number + 1, salt: salt(&path)? };
        self.is_failed.set(true);
        let (state, there) = (self.state.clone(), path.clone());
        let begun = self.companion.run(move || {
            let place = begin(&state, turn, generation, &records)?;
            Ok((place, LogFile::open(&there).map_err(failed("open", &there))?))
        });
        let (place, file) = begun.await?;
        self.is_failed.set(false);
        self.write(before, format::encode_superseded(before.generation, before.offset, before.sequence)).await?;
        self.place.set(place);
        self.file.replace(Arc::new(file));
        Ok(())
    }
}
