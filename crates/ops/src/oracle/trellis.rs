use half::f16;
use marlin_formats::exl3::{Codebook, tile};

use super::Oracle;
use crate::Result;
use crate::trellis::{FIRST_START, Path, PathSearch, Tile};

impl PathSearch for Oracle {
    fn tiles_at_once(&self, _: u32) -> usize {
        1
    }

    fn run_search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>> {
        let values: Vec<f64> = codebook.table().into_iter().map(f64::from).collect();
        let path = |target: &Tile| {
            let target = target.map(|x| f16::from_f32(x).to_f64());
            let states = values.len() >> bits;
            let first = pass(&values, bits, &target, FIRST_START, vec![0.0; states], None);
            let closing = usize::from(first[0]) >> bits;
            let mut costs = vec![f64::INFINITY; states];
            costs[closing] = 0.0;
            pass(&values, bits, &target, 0, costs, Some(closing))
        };
        Ok(targets.iter().map(path).collect())
    }
}

/// One pass over all positions from `start`, with the costs of all states there. The path ends in `end`, or in the
/// cheapest state.
fn pass(
    values: &[f64],
    bits: u32,
    target: &[f64; tile::WEIGHTS],
    start: usize,
    mut costs: Vec<f64>,
    end: Option<usize>,
) -> Path {
    let states = costs.len();
    let position = |t: usize| (start + t) % tile::WEIGHTS;
    let mut words = Vec::with_capacity(tile::WEIGHTS);
    for t in 0..tile::WEIGHTS {
        let mut chosen = vec![0u16; states];
        let mut after = vec![f64::INFINITY; states];
        for (word, value) in values.iter().enumerate() {
            let cost = costs[word >> bits] + (value - target[position(t)]).powi(2);
            let state = word % states;
            if cost < after[state] {
                (after[state], chosen[state]) = (cost, word as u16);
            }
        }
        costs = after;
        words.push(chosen);
    }
    let cheapest = || (0..states).fold(0, |best, state| if costs[state] < costs[best] { state } else { best });
    let mut state = end.unwrap_or_else(cheapest);
    let mut path = [0; tile::WEIGHTS];
    for (t, chosen) in words.iter().enumerate().rev() {
        path[position(t)] = chosen[state];
        state = usize::from(chosen[state]) >> bits;
    }
    path
}
