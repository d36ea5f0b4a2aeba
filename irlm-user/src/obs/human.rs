//! Figures as people read them; programs take the JSON.

/// Bytes with three digits and a binary unit: `17 B`, `1.50 KiB`, `160 MiB`.
#[must_use]
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = n as f64;
    let mut unit = 0;
    // 999.5 would be written with four digits.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{n} B"),
        v if v < 9.995 => format!("{v:.2} {}", UNITS[unit]),
        v if v < 99.95 => format!("{v:.1} {}", UNITS[unit]),
        v => format!("{v:.0} {}", UNITS[unit]),
    }
}

/// Bit/s with a decimal unit, as links are sold: `64 kbit/s`, `9800 Mbit/s`.
#[must_use]
pub fn rate(bits: u64) -> String {
    match bits {
        b if b < 1_000_000 => format!("{} kbit/s", (b + 500) / 1000),
        b if b < 100_000_000 && b % 1_000_000 != 0 => format!("{:.1} Mbit/s", b as f64 / 1e6),
        b => format!("{} Mbit/s", (b + 500_000) / 1_000_000),
    }
}

/// Milliseconds as `12.3 ms`, `4.56 s` or `3 min 20 s`.
#[must_use]
pub fn millis(ms: f64) -> String {
    match ms {
        m if m < 1000.0 => format!("{m:.1} ms"),
        m if m < 120_000.0 => format!("{:.2} s", m / 1000.0),
        m => format!("{:.0} min {:.0} s", (m / 60_000.0).floor(), (m % 60_000.0) / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1536, "1.50 KiB"),
            (10 << 10, "10.0 KiB"),
            (168_000_000, "160 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (n, want) in cases {
            assert_eq!(bytes(n), want);
        }
        assert_eq!(
            [rate(64_000), rate(1_500_000), rate(80_000_000), rate(9_800_000_000)],
            ["64 kbit/s", "1.5 Mbit/s", "80 Mbit/s", "9800 Mbit/s"]
        );
        assert_eq!([millis(12.34), millis(4560.0), millis(200_000.0)], ["12.3 ms", "4.56 s", "3 min 20 s"]);
    }
}
