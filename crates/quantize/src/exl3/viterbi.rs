//! The best tail-biting path of a tile through the trellis.

use half::f16;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::trellis::{FIRST_START, Path, Tile};

use super::aligned::Aligned;
use super::step::{Isa, Steps};

/// Encodes tiles with one codebook at one bit rate.
pub struct Encoder {
    steps: Steps,
    bits: u32,
    /// Steps between two kept arrays of costs; the steps between are computed again for the few states that matter.
    interval: usize,
}

/// Memory that encoding a tile needs, at most 4.5 MiB.
pub struct Workspace {
    /// `[slots, states]`.
    costs: Aligned,
}

impl Encoder {
    /// An encoder of `bits` bits (1 to 8) on the best instruction set of this machine.
    ///
    /// # Panics
    /// When `bits` is not 1 to 8.
    pub fn new(codebook: Codebook, bits: u32) -> Self {
        Self::on(codebook, bits, Isa::best())
    }

    /// The same on a given instruction set, or on portable code when the machine lacks it. The paths are the same.
    ///
    /// # Panics
    /// When `bits` is not 1 to 8.
    pub fn on(codebook: Codebook, bits: u32, isa: Isa) -> Self {
        assert!((1..=8).contains(&bits), "a trellis has 1 to 8 bits a weight");
        Self { steps: Steps::new(codebook, bits as usize, isa), bits, interval: (8 >> (bits - 1)).max(1) }
    }

    /// Bits a weight.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// The value of a word of a path.
    pub fn value(&self, word: u16) -> f32 {
        self.steps.value(word)
    }

    /// Memory for [`Encoder::encode`].
    pub fn workspace(&self) -> Workspace {
        Workspace { costs: Aligned::zeros((tile::WEIGHTS / self.interval + 3) * self.steps.states()) }
    }

    /// The path of `target`, as [`PathSearch`](marlin_ops::PathSearch) defines it.
    ///
    /// # Panics
    /// When a target is not finite as f16, or the workspace is another encoder's.
    pub fn encode(&self, target: &Tile, workspace: &mut Workspace) -> Path {
        let target = &target.map(|x| f16::from_f32(x).to_f32());
        assert!(target.iter().all(|x| x.is_finite()), "targets are finite as f16");
        let mut path = [0; tile::WEIGHTS];
        let mut pass =
            Pass { encoder: self, target, start: FIRST_START, first: FIRST_START, costs: &mut workspace.costs };
        pass.forward(|costs| costs.fill(0.0));
        let end = pass.cheapest_end();
        let closing = pass.trace(end, &mut path);

        pass = Pass { encoder: self, target, start: 0, first: 0, costs: &mut workspace.costs };
        pass.forward(|costs| {
            costs.fill(f32::INFINITY);
            costs[closing] = 0.0;
        });
        let beginning = pass.trace(closing, &mut path);
        debug_assert_eq!(beginning, closing, "the path is a cycle");
        path
    }
}

/// One pass over all positions, cyclically from `start`.
struct Pass<'a> {
    encoder: &'a Encoder,
    target: &'a Tile,
    start: usize,
    /// The first step whose costs are kept: the trace ends there.
    first: usize,
    costs: &'a mut [f32],
}

impl Pass<'_> {
    /// Whether the costs before step `t` stay in memory.
    fn kept(&self, t: usize) -> bool {
        t >= self.first && t.is_multiple_of(self.encoder.interval)
    }

    /// Where the costs before step `t` are: a place of their own, or one of two in turn.
    fn slot(&self, t: usize) -> std::ops::Range<usize> {
        let interval = self.encoder.interval;
        let slot = if self.kept(t) { t / interval } else { tile::WEIGHTS / interval + 1 + t % 2 };
        let states = self.encoder.steps.states();
        slot * states..(slot + 1) * states
    }

    fn position(&self, t: usize) -> usize {
        (self.start + t) % tile::WEIGHTS
    }

    fn forward(&mut self, fill: impl FnOnce(&mut [f32])) {
        let slot = self.slot(0);
        fill(&mut self.costs[slot]);
        for t in 0..tile::WEIGHTS {
            let x = self.target[self.position(t)];
            let slots = [self.slot(t), self.slot(t + 1)];
            let [before, after] = self.costs.get_disjoint_mut(slots).expect("slots of two steps in turn differ");
            self.encoder.steps.run(x, before, after);
        }
    }

    /// The cheapest state at the end, the smallest of several.
    fn cheapest_end(&self) -> usize {
        let costs = &self.costs[self.slot(tile::WEIGHTS)];
        (0..costs.len()).fold(0, |best, state| if costs[state] < costs[best] { state } else { best })
    }

    /// Follows the best path back from `state` at the end; returns its state before step `first`.
    fn trace(&self, mut state: usize, path: &mut Path) -> usize {
        for t in (self.first..tile::WEIGHTS).rev() {
            let (_, word) = self.best(state, t);
            path[self.position(t)] = word;
            state = usize::from(word) >> self.encoder.bits;
        }
        state
    }

    /// The cost of `state` after step `t` and the word that leads to it, of the smallest m among equals.
    fn best(&self, state: usize, t: usize) -> (f32, u16) {
        let steps = &self.encoder.steps;
        let x = self.target[self.position(t)];
        let mut best = (f32::INFINITY, 0);
        for m in 0..1 << self.encoder.bits {
            let word = (m * steps.states() + state) as u16;
            let before = usize::from(word) >> self.encoder.bits;
            let error = steps.value(word) - x;
            let cost = if self.kept(t) { self.costs[self.slot(t)][before] } else { self.best(before, t - 1).0 };
            let cost = cost + error * error;
            if cost < best.0 {
                best = (cost, word);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same two passes as plainly as possible: every decision of every state is kept.
    #[allow(clippy::needless_range_loop, reason = "written as the definition is")]
    fn reference(codebook: Codebook, bits: u32, target: &[f32; tile::WEIGHTS]) -> Path {
        let states = 1 << (16 - bits);
        let values = codebook.table();
        let pass = |start: usize, costs: Vec<f32>, end: Option<usize>| {
            let mut costs = costs;
            let mut decisions = Vec::new();
            for t in 0..tile::WEIGHTS {
                let x = target[(start + t) % tile::WEIGHTS];
                let mut chosen = vec![0u16; states];
                let mut after = vec![f32::INFINITY; states];
                for state in 0..states {
                    for m in 0..1 << bits {
                        let word = m * states + state;
                        let error = values[word].to_f32() - x;
                        let cost = costs[word >> bits] + error * error;
                        if cost < after[state] {
                            (after[state], chosen[state]) = (cost, word as u16);
                        }
                    }
                }
                costs = after;
                decisions.push(chosen);
            }
            let cheapest = || (0..states).min_by(|&a, &b| costs[a].total_cmp(&costs[b])).unwrap();
            let mut state = end.unwrap_or_else(cheapest);
            let mut path = [0; tile::WEIGHTS];
            for (t, chosen) in decisions.iter().enumerate().rev() {
                path[(start + t) % tile::WEIGHTS] = chosen[state];
                state = usize::from(chosen[state]) >> bits;
            }
            path
        };
        let closing = usize::from(pass(128, vec![0.0; states], None)[0]) >> bits;
        let mut costs = vec![f32::INFINITY; states];
        costs[closing] = 0.0;
        pass(0, costs, Some(closing))
    }

    /// Values between -2 and 2 on a coarse grid, exact in f16, and runs of zeros: both give ties.
    fn targets() -> [[f32; tile::WEIGHTS]; 2] {
        let grid = |i: usize| ((i * 7919 + 13) % 17) as f32 / 4.0 - 2.0;
        [std::array::from_fn(grid), std::array::from_fn(|i| if i % 64 < 40 { 0.0 } else { grid(i) * 0.375 })]
    }

    #[test]
    fn every_instruction_set_finds_the_path_of_the_plain_search() {
        let targets = targets();
        for bits in 1..=8 {
            let codebook = Codebook::ALL[bits as usize % 3];
            for target in &targets {
                let expected = reference(codebook, bits, target);
                for isa in Isa::ALL {
                    let encoder = Encoder::on(codebook, bits, isa);
                    let path = encoder.encode(target, &mut encoder.workspace());
                    assert!(path == expected, "{bits} bits, {isa:?}");
                }
            }
        }
    }

    #[test]
    fn a_used_workspace_changes_nothing() {
        let [first, second] = targets();
        let encoder = Encoder::new(Codebook::Mul1, 3);
        let fresh = encoder.encode(&second, &mut encoder.workspace());
        let mut used = encoder.workspace();
        encoder.encode(&first, &mut used);
        assert!(encoder.encode(&second, &mut used) == fresh);
    }
}
