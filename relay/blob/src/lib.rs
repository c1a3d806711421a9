//! Blobs over chunks: trees, extents, references, one hash partition
