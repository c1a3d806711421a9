//! Messages on the local socket of a node
