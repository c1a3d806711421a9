//! What the product must keep, judged on one flat map of measured figures.
//!
//! A floor is a bound on a figure: a number, or a multiple of another figure of the same rounds. Only ratios carry from one machine
//! to the next, so most are; the absolute ones are what users were promised.

use std::{collections::BTreeMap, fmt::Write as _};

/// Measured figures by key: medians over rounds.
pub(crate) type Figures = BTreeMap<String, f64>;

/// Whether more or less of a figure is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    AtLeast,
    AtMost,
}

/// What a figure is compared with.
#[derive(Debug, Clone, Copy)]
enum Against {
    /// A number in the figure's own unit.
    Number(f64),
    /// So many times another figure.
    Times(f64, &'static str),
    /// Another figure that it is only shown beside: what the machine could do if nothing else were to be done.
    Beside(&'static str),
    /// Nothing: it is printed, and must be there.
    Nothing,
}

/// A figure and what is asked of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floor {
    figure: &'static str,
    bound: Bound,
    against: Against,
}

const fn floor(figure: &'static str, bound: Bound, against: Against) -> Floor {
    Floor { figure, bound, against }
}

use Against::{Beside, Nothing, Number, Times};
use Bound::{AtLeast, AtMost};

/// The floors of the relay, in the order of the table.
pub(crate) const RELAY: &[Floor] = &[
    floor("get_4k_ops", AtLeast, Times(3.5, "get_4k_iroh_ops")),
    floor("get_4k_server_us", AtMost, Number(5.5)),
    floor("put_4k_durable_ops", AtLeast, Times(6.0, "put_4k_iroh_fs_ops")),
    floor("put_4k_durable_ops", AtLeast, Times(0.30, "raw_commit_ops")),
    floor("put_4k_durable_ops", AtLeast, Beside("raw_commit_together_ops")),
    floor("get_4k_cold_ops", AtLeast, Times(0.5, "raw_read_4k_ops")),
    floor("get_4k_open_p99_us", AtMost, Number(2000.0)),
    floor("machine_steady_share", AtLeast, Nothing),
    floor("get_4k_idle_p50_us", AtMost, Times(1.5, "quinn_idle_p50_us")),
    floor("get_1g_mbs", AtLeast, Times(1.5, "get_1g_iroh_mbs")),
    floor("get_1g_mbs", AtLeast, Number(1000.0)),
    floor("get_1g_cold_mbs", AtLeast, Times(0.7, "raw_read_mbs")),
    floor("get_1g_cold_mbs", AtLeast, Beside("raw_read_deep_mbs")),
    floor("put_1g_durable_mbs", AtLeast, Number(500.0)),
    floor("put_1g_durable_mbs", AtLeast, Times(2.0, "put_1g_iroh_fs_mbs")),
    floor("idle_conn_kib", AtMost, Number(32.0)),
    floor("handshakes_ops", AtLeast, Nothing),
];

/// The floors over a bad path.
pub(crate) const NETWORK: &[Floor] = &[
    floor("lossy_get_mbs", AtLeast, Times(0.6, "quinn_lossy_get_mbs")),
    floor("lossy_put_mbs", AtLeast, Times(0.6, "quinn_lossy_put_mbs")),
    floor("lossy6_get_mbs", AtLeast, Times(0.6, "quinn_lossy_get_mbs")),
    floor("lossy6_put_mbs", AtLeast, Times(0.6, "quinn_lossy_put_mbs")),
    // What was sent for each byte that counted: a path that loses 1 % may cost no more than what is lost and what QUIC adds.
    floor("lossy_get_wire_share", AtMost, Number(1.1)),
    floor("lossy_put_wire_share", AtMost, Number(1.1)),
];

/// The floors of validators.
pub(crate) const CONSENSUS: &[Floor] = &[
    floor("finality_empty_p50_ms", AtMost, Number(5.0)),
    floor("finality_empty_p99_ms", AtMost, Number(20.0)),
    floor("executed_p50_ms", AtLeast, Nothing),
    floor("verify_batched_ops_core", AtLeast, Nothing),
    // Four validators on two cores that did nothing but check signatures would do half of what a core does.
    floor("tx_signed_ops", AtLeast, Times(0.4 * 2.0 / 4.0, "verify_batched_ops_core")),
    floor("tx_signed_finality_p50_ms", AtLeast, Nothing),
    floor("tx_signed_finality_p99_ms", AtLeast, Nothing),
    floor("tx_signed_cpu_us", AtLeast, Nothing),
    floor("tx_opaque_ops", AtLeast, Number(60_000.0)),
    floor("tx_opaque_cpu_us", AtLeast, Nothing),
    floor("socket_executed_p50_ms", AtLeast, Beside("executed_p50_ms")),
    floor("socket_tx_signed_ops", AtLeast, Times(0.5, "tx_signed_ops")),
    floor("socket_tx_signed_cpu_us", AtLeast, Beside("tx_signed_cpu_us")),
    floor("n7_finality_empty_p50_ms", AtLeast, Beside("finality_empty_p50_ms")),
    floor("n7_block_messages", AtLeast, Beside("block_messages")),
    floor("n7_block_message_bytes", AtLeast, Beside("block_message_bytes")),
    floor("n7_block_signatures_checked", AtLeast, Beside("block_signatures_checked")),
    floor("n7_tx_signed_ops", AtLeast, Beside("tx_signed_ops")),
    floor("n7_tx_opaque_ops", AtLeast, Beside("tx_opaque_ops")),
];

/// The floors under floods.
pub(crate) const FLOOD: &[Floor] = &[
    floor("flood_get_p99_us", AtMost, Times(10.0, "flood_quiet_get_p99_us")),
    floor("flood_rss_growth_mib", AtMost, Number(64.0)),
    floor("flood_retries", AtLeast, Number(1.0)),
];

/// The floors under ten times the load that the node can do.
pub(crate) const OVERLOAD: &[Floor] = &[
    // The worst ten seconds of the minute.
    floor("overload_worst_ops", AtLeast, Times(0.8, "overload_best_ops")),
    floor("overload_offered_ops", AtLeast, Times(9.9, "overload_best_ops")),
    floor("overload_rss_mib", AtMost, Times(1.0, "overload_memory_limit_mib")),
    floor("overload_refused_ops", AtLeast, Number(1.0)),
    floor("overload_hint_ms", AtLeast, Number(1.0)),
];

/// A floor beside what was measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    figure: &'static str,
    value: Option<f64>,
    /// The other figure, when the floor is relative.
    peer: Option<(&'static str, Option<f64>)>,
    ratio: Option<f64>,
    /// `≥ 3.5 ×`.
    floor: String,
    verdict: Verdict,
}

/// How a floor was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It was.
    Kept,
    /// It was not.
    Below,
    /// A figure is missing, so nothing is known.
    Missing,
}

impl Row {
    /// Whether it was measured and kept.
    pub(crate) fn is_kept(&self) -> bool {
        self.verdict == Verdict::Kept
    }

    fn verdict(&self) -> &'static str {
        match self.verdict {
            Verdict::Kept => "ok",
            Verdict::Below => "BELOW",
            Verdict::Missing => "NOT MEASURED",
        }
    }

    /// Figure, value, peer, ratio, floor, verdict.
    fn cells(&self) -> [String; 6] {
        let peer = self.peer.map(|(name, value)| format!("{} ({name})", shown(value))).unwrap_or_default();
        let ratio = self.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        [self.figure.to_owned(), shown(self.value), peer, ratio, self.floor.clone(), self.verdict().to_owned()]
    }
}

/// Judges every floor. Figures that are missing, or are no positive number, keep none.
pub(crate) fn judge(floors: &[Floor], figures: &Figures) -> Vec<Row> {
    floors.iter().map(|floor| floor.judge(figures)).collect()
}

/// The figures that the floors need.
pub(crate) fn required(floors: &[Floor]) -> impl Iterator<Item = &'static str> {
    floors.iter().flat_map(|floor| {
        let peer = match floor.against {
            Times(_, peer) | Beside(peer) => Some(peer),
            Number(_) | Nothing => None,
        };
        std::iter::once(floor.figure).chain(peer)
    })
}

impl Floor {
    fn judge(&self, figures: &Figures) -> Row {
        let find = |key: &str| figures.get(key).copied().filter(|value| value.is_finite() && *value > 0.0);
        let value = find(self.figure);
        let sign = if self.bound == AtLeast { "≥" } else { "≤" };
        let (peer, limit, floor) = match self.against {
            Number(limit) => (None, Some(limit), format!("{sign} {limit}")),
            Times(factor, peer) => {
                let other = find(peer);
                (Some((peer, other)), other.map(|other| factor * other), format!("{sign} {factor} ×"))
            }
            Beside(peer) => {
                let other = find(peer);
                (Some((peer, other)), other.map(|_| 0.0), "–".to_owned())
            }
            Nothing => (None, Some(0.0), "–".to_owned()),
        };
        let ratio = peer.and_then(|(_, other)| Some(value? / other?));
        let verdict = match (value, limit, self.bound) {
            (Some(value), Some(limit), AtLeast) if value >= limit => Verdict::Kept,
            (Some(value), Some(limit), AtMost) if value <= limit => Verdict::Kept,
            (Some(_), Some(_), _) => Verdict::Below,
            (None, ..) | (_, None, _) => Verdict::Missing,
        };
        Row { figure: self.figure, value, peer, ratio, floor, verdict }
    }
}

/// Three significant digits below a hundred, whole numbers above, thousands apart.
fn shown(value: Option<f64>) -> String {
    let Some(value) = value else { return "–".to_owned() };
    if value < 100.0 {
        return format!("{value:.*}", if value < 10.0 { 2 } else { 1 });
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

const HEADINGS: [&str; 6] = ["figure", "value", "peer", "ratio", "floor", ""];

/// The rows as columns for a terminal.
pub(crate) fn table(rows: &[Row]) -> String {
    let cells: Vec<[String; 6]> =
        std::iter::once(HEADINGS.map(str::to_owned)).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut out = String::new();
    for row in &cells {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = " ".repeat(widths[column] - cell.chars().count());
            // Numbers to the right.
            let _ = if matches!(column, 1 | 3) { write!(line, "{gap}{cell}  ") } else { write!(line, "{cell}{gap}  ") };
        }
        out += line.trim_end();
        out.push('\n');
    }
    out
}

/// The rows in Markdown, for the README.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut out = String::from("| figure | value | peer | ratio | floor | |\n|---|--:|---|--:|---|---|\n");
    for row in rows {
        let [figure, value, peer, ratio, floor, verdict] = row.cells();
        let peer = peer.replace('(', "(`").replace(')', "`)");
        let _ = writeln!(out, "| `{figure}` | {value} | {peer} | {ratio} | {floor} | {verdict} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Figures that keep every floor, each by nothing to spare.
    fn exact() -> Figures {
        [
            ("quinn_lossy_get_mbs", 10.0),
            ("quinn_lossy_put_mbs", 10.0),
            ("lossy_get_mbs", 6.0),
            ("lossy_put_mbs", 6.0),
            ("lossy6_get_mbs", 6.0),
            ("lossy6_put_mbs", 6.0),
            ("lossy_get_wire_share", 1.1),
            ("lossy_put_wire_share", 1.1),
            ("flood_quiet_get_p99_us", 100.0),
            ("flood_get_p99_us", 1_000.0),
            ("flood_rss_growth_mib", 64.0),
            ("flood_retries", 1.0),
            ("overload_best_ops", 1_000.0),
            ("overload_worst_ops", 800.0),
            ("overload_offered_ops", 9_900.0),
            ("overload_rss_mib", 500.0),
            ("overload_memory_limit_mib", 500.0),
            ("overload_refused_ops", 1.0),
            ("overload_hint_ms", 1.0),
            ("get_4k_iroh_ops", 40_000.0),
            ("get_4k_ops", 140_000.0),
            ("get_4k_server_us", 5.5),
            ("put_4k_iroh_fs_ops", 8_000.0),
            ("put_4k_durable_ops", 48_000.0),
            ("raw_commit_ops", 160_000.0),
            ("raw_commit_together_ops", 320_000.0),
            ("raw_read_4k_ops", 80_000.0),
            ("get_4k_cold_ops", 40_000.0),
            ("get_4k_open_p99_us", 2_000.0),
            ("machine_steady_share", 1.0),
            ("quinn_idle_p50_us", 100.0),
            ("get_4k_idle_p50_us", 150.0),
            ("get_1g_iroh_mbs", 800.0),
            ("get_1g_mbs", 1_200.0),
            ("raw_read_mbs", 1_000.0),
            ("raw_read_deep_mbs", 3_000.0),
            ("get_1g_cold_mbs", 700.0),
            ("put_1g_iroh_fs_mbs", 250.0),
            ("put_1g_durable_mbs", 500.0),
            ("idle_conn_kib", 32.0),
            ("handshakes_ops", 1.0),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }

    /// The floors of all suites.
    fn all() -> Vec<Floor> {
        [RELAY, NETWORK, FLOOD, OVERLOAD].concat()
    }

    fn not_kept(figures: &Figures) -> Vec<(&'static str, Verdict)> {
        judge(&all(), figures).iter().filter(|row| !row.is_kept()).map(|row| (row.figure, row.verdict)).collect()
    }

    #[test]
    fn floors_are_inclusive() {
        assert_eq!(not_kept(&exact()), []);
    }

    #[test]
    fn each_floor_can_fail_on_its_own_figure() {
        for floor in all().iter().filter(|floor| !matches!(floor.against, Beside(_) | Nothing)) {
            let mut figures = exact();
            let worse = if floor.bound == AtLeast { 0.1 } else { 10.0 };
            *figures.get_mut(floor.figure).expect("it is required") *= worse;
            assert_eq!(floor.judge(&figures).verdict, Verdict::Below, "{floor:?}");
        }
    }

    #[test]
    fn each_relative_floor_can_fail_on_its_peer() {
        for floor in all() {
            let Times(_, peer) = floor.against else { continue };
            let mut figures = exact();
            let better = if floor.bound == AtLeast { 10.0 } else { 0.1 };
            *figures.get_mut(peer).expect("it is required") *= better;
            assert_eq!(floor.judge(&figures).verdict, Verdict::Below, "{floor:?}");
        }
    }

    #[test]
    fn a_figure_that_is_missing_or_no_number_keeps_no_floor() {
        for key in required(&all()) {
            for value in [None, Some(f64::NAN), Some(0.0), Some(-1.0), Some(f64::INFINITY)] {
                let mut figures = exact();
                figures.remove(key);
                figures.extend(value.map(|value| (key.to_owned(), value)));
                let found = not_kept(&figures);
                assert!(
                    !found.is_empty() && found.iter().all(|(_, verdict)| *verdict == Verdict::Missing),
                    "{key}: {found:?}"
                );
            }
        }
    }

    #[test]
    fn tables_show_all_six_columns() {
        let mut figures = exact();
        figures.insert("get_4k_ops".to_owned(), 100_000.0);
        let rows = judge(RELAY, &figures);
        let lines = table(&rows);
        assert_eq!(lines.lines().count(), 1 + RELAY.len());
        let first = lines.lines().nth(1).expect("a row");
        let words: Vec<_> = first.split_whitespace().collect();
        assert_eq!(words, ["get_4k_ops", "100,000", "40,000", "(get_4k_iroh_ops)", "2.50", "≥", "3.5", "×", "BELOW"]);
        let first = markdown(&rows).lines().nth(2).expect("a row").to_owned();
        assert_eq!(first, "| `get_4k_ops` | 100,000 | 40,000 (`get_4k_iroh_ops`) | 2.50 | ≥ 3.5 × | BELOW |");
    }

    #[test]
    fn numbers_are_readable() {
        for (value, text) in [
            (0.5, "0.50"),
            (5.456, "5.46"),
            (32.04, "32.0"),
            (123.4, "123"),
            (1_234.5, "1,234"),
            (1_234_567.0, "1,234,567"),
        ] {
            assert_eq!(shown(Some(value)), text);
        }
    }
}
