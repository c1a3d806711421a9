use metanode_shard::metrics::{Counter, Gauge, Histogram, TextWriter};

/// What one shard's store counts.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "each is described where it is written out")]
pub struct StoreCounters {
    pub cache_hits: Counter,
    pub cache_misses: Counter,
    pub cache_bytes: Gauge,
    pub reads: Counter,
    pub read_bytes: Counter,
    pub corrupt_reads: Counter,
    pub frames: Counter,
    pub records: Counter,
    pub written_bytes: Counter,
    pub syncs: Counter,
    pub sync_duration: Histogram,
    pub sync_failures: Counter,
    pub staged_bytes: Gauge,
    pub compacted_segments: Counter,
    pub moved_bytes: Counter,
    pub blobs: Gauge,
    pub blob_bytes: Gauge,
    pub segments: Gauge,
    pub segment_bytes: Gauge,
    pub orphan_bytes: Gauge,
    pub scrub_running: Gauge,
    pub scrub_passes: Counter,
    pub scrub_bytes: Counter,
    pub scrub_corrupt: Counter,
    /// Numbers of the latest requests that were done.
    pub scrub_done: Gauge,
    pub survey_done: Gauge,
    pub compact_asked: Gauge,
    pub compact_done: Gauge,
    pub mesh_requests: Counter,
}

impl StoreCounters {
    /// Writes all of them with the label `shard`.
    pub fn write(&self, out: &mut TextWriter, shard: &str) {
        let l = &[("shard", shard)];
        out.counter("store_cache_hits_total", "GETs answered from the memory cache", l, &self.cache_hits);
        out.counter("store_cache_misses_total", "GETs that were not in the memory cache", l, &self.cache_misses);
        out.gauge("store_cache_bytes", "Bytes in the memory cache", l, &self.cache_bytes);
        out.counter("store_reads_total", "Payloads read from segments", l, &self.reads);
        out.counter("store_read_bytes_total", "Bytes of payloads read from segments", l, &self.read_bytes);
        out.counter("store_corrupt_reads_total", "Payloads that did not have their hash", l, &self.corrupt_reads);
        out.counter("store_frames_total", "Commit frames written", l, &self.frames);
        out.counter("store_records_total", "Records committed", l, &self.records);
        out.counter("store_written_bytes_total", "Bytes of commit frames", l, &self.written_bytes);
        out.counter("store_fsyncs_total", "fdatasync calls of the log", l, &self.syncs);
        out.histogram("store_fsync_seconds", "Duration of fdatasync", l, &self.sync_duration);
        out.counter("store_fsync_failures_total", "Failed writes and syncs of the log", l, &self.sync_failures);
        out.gauge("store_staged_bytes", "Bytes waiting for a commit frame", l, &self.staged_bytes);
        out.counter("store_compacted_segments_total", "Segments freed", l, &self.compacted_segments);
        out.counter("store_moved_bytes_total", "Bytes that compaction copied", l, &self.moved_bytes);
        out.gauge("store_blobs", "Blobs", l, &self.blobs);
        out.gauge("store_blob_bytes", "Bytes of the blobs' contents", l, &self.blob_bytes);
        out.gauge("store_segments", "Segments", l, &self.segments);
        out.gauge("store_segment_bytes", "Bytes of segment files", l, &self.segment_bytes);
        out.gauge("store_orphan_bytes", "Bytes that interrupted uploads have left", l, &self.orphan_bytes);
        out.gauge("store_scrub_running", "Whether a scrub is under way", l, &self.scrub_running);
        out.counter("store_scrub_passes_total", "Scrubs that came to the end", l, &self.scrub_passes);
        out.counter("store_scrub_bytes_total", "Bytes that scrubs have read", l, &self.scrub_bytes);
        out.counter(
            "store_scrub_corrupt_total",
            "Chunks and maps that scrubs found to be damaged",
            l,
            &self.scrub_corrupt,
        );
        out.counter("store_mesh_requests_total", "Requests that went to another shard", l, &self.mesh_requests);
    }
}
