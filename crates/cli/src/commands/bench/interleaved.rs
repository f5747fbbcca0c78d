//! Decode against plain reads taken in turn with it: a machine whose memory changes pace meanwhile changes it for both.

use std::time::Duration;

use anyhow::Result;
use marlin_cpu::{Pages, PlainReads};
use serde_json::{Value, json};

/// Bytes of one turn of decoding.
const TURN_BYTES: f64 = (1u64 << 30) as f64;
/// Most tokens of a turn.
const MOST_TOKENS: usize = 4;

/// Tokens of a turn, and the passes of plain reads that take about as many bytes.
#[derive(Clone, Copy)]
pub struct Turn {
    pub tokens: usize,
    passes: usize,
}

impl Turn {
    /// For a decode that reads this many bytes a token.
    pub fn new(bytes_per_token: f64) -> Self {
        let tokens = (TURN_BYTES / bytes_per_token).round().clamp(1.0, MOST_TOKENS as f64) as usize;
        let passes = (tokens as f64 * bytes_per_token / PlainReads::BYTES as f64).round().max(1.0) as usize;
        Self { tokens, passes }
    }

    /// Bytes per second of a turn of plain reads.
    fn plain_bytes_per_s(self, reads: &PlainReads<'_>) -> f64 {
        let time: Duration = (0..self.passes).map(|_| reads.pass()).sum();
        (self.passes * PlainReads::BYTES) as f64 / time.as_secs_f64()
    }
}

/// One turn of decoding.
struct Round {
    bytes_per_s: f64,
    /// Means of the plain reads before and after it, by [`Pages`].
    plain_bytes_per_s: [f64; 2],
}

/// All rounds, by their shares of the plain reads.
pub struct Interleaved {
    turn: Turn,
    rounds: Vec<Round>,
}

impl Interleaved {
    /// Reads and decodes in turn. `reads` go through the kinds of [`Pages`] in their order; `decode` gets the number of
    /// each round and returns the tokens it decoded and their time.
    pub fn measure(
        turn: Turn,
        rounds: usize,
        bytes_per_token: f64,
        reads: &[PlainReads<'_>; 2],
        mut decode: impl FnMut(usize) -> Result<(usize, Duration)>,
    ) -> Result<Self> {
        // Not counted: the first touch of the buffers.
        for reads in reads {
            reads.pass();
        }
        let plain = || reads.each_ref().map(|reads| turn.plain_bytes_per_s(reads));
        let mut before = plain();
        let mut all = Vec::with_capacity(rounds);
        for i in 0..rounds {
            let (tokens, time) = decode(i)?;
            let after = plain();
            all.push(Round {
                bytes_per_s: tokens as f64 * bytes_per_token / time.as_secs_f64(),
                plain_bytes_per_s: std::array::from_fn(|pages| (before[pages] + after[pages]) / 2.0),
            });
            before = after;
        }
        Ok(Self { turn, rounds: all })
    }

    /// Quantile of the rounds' shares of the reads of huge or small pages, 0.5 for the median; at least one round.
    fn share(&self, pages: Pages, quantile: f64) -> f64 {
        let share = |round: &Round| round.bytes_per_s / round.plain_bytes_per_s[pages as usize];
        quantile_of(self.rounds.iter().map(share), quantile)
    }

    fn median_bytes_per_s(&self) -> f64 {
        quantile_of(self.rounds.iter().map(|round| round.bytes_per_s), 0.5)
    }

    fn median_plain_bytes_per_s(&self, pages: Pages) -> f64 {
        quantile_of(self.rounds.iter().map(|round| round.plain_bytes_per_s[pages as usize]), 0.5)
    }

    /// Rounds, and the quartiles of the shares.
    pub fn to_json(&self) -> Value {
        json!({
            "rounds": self.rounds.len(),
            "tokens_per_round": self.turn.tokens,
            "decode_bytes_per_s": self.median_bytes_per_s(),
            "plain_bytes_per_s": self.median_plain_bytes_per_s(Pages::Huge),
            "lower_quartile": self.share(Pages::Huge, 0.25),
            "median": self.share(Pages::Huge, 0.5),
            "upper_quartile": self.share(Pages::Huge, 0.75),
            "small_pages_bytes_per_s": self.median_plain_bytes_per_s(Pages::Small),
            "small_pages_median": self.share(Pages::Small, 0.5),
        })
    }

    /// Two lines.
    pub fn print(&self) -> Result<()> {
        print_line!(
            "in turn  {:.1} GB/s next to plain reads of {:.1} GB/s: {:.1} % of them (quartiles {:.1} and {:.1} %, {} rounds)",
            self.median_bytes_per_s() / 1e9,
            self.median_plain_bytes_per_s(Pages::Huge) / 1e9,
            100.0 * self.share(Pages::Huge, 0.5),
            100.0 * self.share(Pages::Huge, 0.25),
            100.0 * self.share(Pages::Huge, 0.75),
            self.rounds.len(),
        );
        print_line!(
            "         {:.1} % of plain reads of {:.1} GB/s from small pages",
            100.0 * self.share(Pages::Small, 0.5),
            self.median_plain_bytes_per_s(Pages::Small) / 1e9,
        );
        Ok(())
    }
}

/// Linear between neighbours in order; at least one value.
fn quantile_of(values: impl Iterator<Item = f64>, quantile: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = quantile * (values.len() - 1) as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let values = || [4.0, 1.0, 3.0, 2.0].into_iter();
        assert_eq!([0.0, 0.25, 0.5, 1.0].map(|q| quantile_of(values(), q)), [1.0, 1.75, 2.5, 4.0]);
        assert_eq!(quantile_of([7.0].into_iter(), 0.75), 7.0);
    }

    #[test]
    fn a_turn_takes_as_many_bytes_both_ways() {
        for (bytes_per_token, tokens, passes) in [(1e3, 4, 1), (335e6, 3, 4), (150e6, 4, 2), (4e9, 1, 15)] {
            let turn = Turn::new(bytes_per_token);
            assert_eq!((turn.tokens, turn.passes), (tokens, passes), "{bytes_per_token}");
        }
    }
}
