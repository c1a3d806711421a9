/// When a PUT is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum DurabilityClass {
    /// Once it is in the memory of the node; a crash may lose it.
    Memory = 0,
    /// After `fdatasync`: it survives a crash of the process and of the machine.
    #[default]
    Durable = 1,
}

impl DurabilityClass {
    /// The class with this number, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Memory),
            1 => Some(Self::Durable),
            _ => None,
        }
    }
}

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum BlobKind {
    /// Bytes.
    #[default]
    Blob = 0,
    /// A folder manifest; it keeps the blobs it lists alive.
    Folder = 1,
}

impl BlobKind {
    /// The kind with this number, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Blob),
            1 => Some(Self::Folder),
            _ => None,
        }
    }
}
