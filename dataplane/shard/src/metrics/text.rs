use std::fmt::Write as _;

use super::{Counter, Gauge, Histogram};

/// Labels of one sample: names as Prometheus allows them, values of any text.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Writes metrics in Prometheus' text exposition format, version 0.0.4.
///
/// Samples of one metric must follow each other (that is the format's rule): write a name with all its label sets, then the
/// next name. HELP and TYPE are written once for each run of the same name.
#[derive(Debug, Default)]
pub struct TextWriter {
    text: String,
    current: String,
}

impl TextWriter {
    /// The value of the HTTP header `Content-Type` that goes with the text.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    /// An empty text.
    pub fn new() -> Self {
        Self::default()
    }

    /// A counter. By convention its name ends in `_total`.
    pub fn counter(&mut self, name: &str, help: &str, labels: Labels<'_>, counter: &Counter) {
        self.counter_value(name, help, labels, counter.value());
    }

    /// A counter whose value was computed.
    pub fn counter_value(&mut self, name: &str, help: &str, labels: Labels<'_>, value: u64) {
        self.head(name, help, "counter");
        self.sample(name, labels, None, value);
    }

    /// A gauge.
    pub fn gauge(&mut self, name: &str, help: &str, labels: Labels<'_>, gauge: &Gauge) {
        self.gauge_value(name, help, labels, gauge.value() as f64);
    }

    /// A gauge whose value was computed.
    pub fn gauge_value(&mut self, name: &str, help: &str, labels: Labels<'_>, value: f64) {
        self.head(name, help, "gauge");
        self.sample(name, labels, None, value);
    }

    /// A histogram, in seconds; by convention its name ends in `_seconds`. One bucket an octave.
    pub fn histogram(&mut self, name: &str, help: &str, labels: Labels<'_>, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let bucket = format!("{name}_bucket");
        for (end, count) in histogram.cumulative_octaves() {
            self.sample(&bucket, labels, Some(("le", &end.to_string())), count);
        }
        let count = histogram.count();
        self.sample(&bucket, labels, Some(("le", "+Inf")), count);
        self.sample(&format!("{name}_sum"), labels, None, histogram.sum().as_secs_f64());
        self.sample(&format!("{name}_count"), labels, None, count);
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        debug_assert!(is_metric_name(name), "{name}");
        if self.current == name {
            return;
        }
        name.clone_into(&mut self.current);
        self.text.push_str("# HELP ");
        self.text.push_str(name);
        self.text.push(' ');
        escape(&mut self.text, help, false);
        self.text.push_str("\n# TYPE ");
        self.text.push_str(name);
        self.text.push(' ');
        self.text.push_str(kind);
        self.text.push('\n');
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, extra: Option<(&str, &str)>, value: impl std::fmt::Display) {
        self.text.push_str(name);
        let mut separator = '{';
        for (label, text) in labels.iter().copied().chain(extra) {
            self.text.push(separator);
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(&mut self.text, text, true);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        writeln!(self.text, " {value}").expect("writing to a string does not fail");
    }
}

/// Backslash and line feed everywhere, the quotation mark in label values.
fn escape(out: &mut String, text: &str, in_label: bool) {
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if in_label => out.push_str("\\\""),
            other => out.push(other),
        }
    }
}

fn is_metric_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let first = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_' || byte == b':';
    bytes.next().is_some_and(first) && bytes.all(|byte| first(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn writes_the_exposition_format() {
        let counter = Counter::default();
        counter.add(3);
        let gauge = Gauge::default();
        gauge.add(7);
        gauge.sub(2);
        let mut writer = TextWriter::new();
        writer.counter("shard_stalls_total", "Rescues,\nso to speak \\", &[("shard", "0")], &counter);
        writer.counter_value(
            "shard_stalls_total",
            "Rescues,\nso to speak \\",
            &[("shard", "1"), ("why", "a\"b\\c\nd")],
            9,
        );
        writer.gauge("connections_open", "Open.", &[], &gauge);
        let expected = concat!(
            "# HELP shard_stalls_total Rescues,\\nso to speak \\\\\n",
            "# TYPE shard_stalls_total counter\n",
            "shard_stalls_total{shard=\"0\"} 3\n",
            "shard_stalls_total{shard=\"1\",why=\"a\\\"b\\\\c\\nd\"} 9\n",
            "# HELP connections_open Open.\n",
            "# TYPE connections_open gauge\n",
            "connections_open 5\n",
        );
        assert_eq!(writer.finish(), expected);
    }

    #[test]
    fn histogram_buckets_are_cumulative_and_end_with_infinity() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_nanos(500));
        histogram.record(Duration::from_micros(3));
        histogram.record(Duration::from_secs(100));
        let mut writer = TextWriter::new();
        writer.histogram("get_seconds", "GET.", &[("shard", "0")], &histogram);
        let text = writer.finish();
        assert!(text.contains("get_seconds_bucket{shard=\"0\",le=\"0.000001024\"} 1\n"), "{text}");
        assert!(text.contains("get_seconds_bucket{shard=\"0\",le=\"0.000004096\"} 2\n"), "{text}");
        assert!(text.contains("get_seconds_bucket{shard=\"0\",le=\"68.719476736\"} 2\n"), "{text}");
        assert!(
            text.ends_with(
                "le=\"+Inf\"} 3\nget_seconds_sum{shard=\"0\"} 100.0000035\nget_seconds_count{shard=\"0\"} 3\n"
            )
        );
        let counts: Vec<u64> = text
            .lines()
            .filter(|l| l.contains("_bucket"))
            .map(|l| l.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(counts.is_sorted());
    }
}
