//! The search for EXL3 codes at every rate and with every codebook. Among paths of almost equal cost the rounding of f32
//! decides, so that costs are compared, and whether paths are paths.

use half::f16;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::trellis::{Path, Tile};
use marlin_ops::{Backend, OpError, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::Output;
use crate::random::Random;
use crate::tolerance::{self, Tolerance};

#[derive(Clone, Copy)]
struct SearchCase {
    codebook: Codebook,
    bits: u32,
    tiles: usize,
    /// Factor on normal targets.
    scale: f32,
    /// The last target of all, if it is another.
    last: Option<f32>,
}

impl SearchCase {
    fn targets(&self) -> Vec<Tile> {
        let random = &mut Random::of(&self.configuration());
        let values: Vec<f32> =
            random.normals(self.tiles * tile::WEIGHTS).iter().map(|target| target * self.scale).collect();
        let mut tiles = values.as_chunks::<{ tile::WEIGHTS }>().0.to_vec();
        if let (Some(last), Some(target)) = (self.last, tiles.last_mut().and_then(|tile| tile.last_mut())) {
            *target = last;
        }
        tiles
    }

    /// The sum of squared errors.
    fn cost(&self, path: &Path, target: &Tile) -> f64 {
        let error = |(&word, &x): (&u16, &f32)| self.codebook.value(word).to_f64() - f16::from_f32(x).to_f64();
        path.iter().zip(target).map(|pair| error(pair).powi(2)).sum()
    }

    /// Words that do not continue the one before, in the cycle.
    fn breaks(&self, path: &Path) -> f64 {
        let before = |p: usize| path[(p + path.len() - 1) % path.len()];
        let breaks = |p: &usize| u32::from(path[*p]) >> self.bits != u32::from(before(*p)) & (0xFFFF >> self.bits);
        (0..path.len()).filter(breaks).count() as f64
    }
}

impl Case for SearchCase {
    const OPERATION: &'static str = "search_paths";

    fn configuration(&self) -> String {
        let Self { codebook, bits, tiles, scale, last } = self;
        format!("{} bits={bits} T={tiles} x*{scale} last={last:?}", codebook.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let none = || OpError::Device { operation: "search_paths", reason: "it has no search".into() };
        let paths = b.path_search().ok_or_else(none)?.search_paths(self.codebook, self.bits, &self.targets())?;
        let costs = paths.iter().zip(self.targets()).map(|(path, target)| self.cost(path, &target)).collect();
        let breaks = paths.iter().map(|path| self.breaks(path)).collect();
        Ok(vec![Output { name: "costs", values: costs }, Output { name: "breaks", values: breaks }])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let relative = Tolerance::Elements { ulps: 0.0, relative: tolerance::PATH_COST, absolute: vec![] };
        vec![relative, Tolerance::Exact]
    }
}

/// Nothing for a device that leaves the search to the quantizer.
pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    if !runner.has_path_search() {
        return;
    }
    let case = |codebook, bits, tiles, scale| SearchCase { codebook, bits, tiles, scale, last: None };
    for bits in 1..=8 {
        runner.check(&case(Codebook::ALL[bits as usize % 3], bits, 2, 1.0));
    }
    runner.check(&case(Codebook::Mul1, 3, 3, 0.01));
    // Beyond what the values reach.
    runner.check(&case(Codebook::Mcg, 4, 1, 40.0));
    let one = case(Codebook::Mul1, 8, 1, 1.0);
    for bits in [0, 9] {
        runner.refuse(&format!("{bits} bits"), &SearchCase { bits, ..one }, Refusal::Value("bits"));
    }
    for last in [f32::NAN, f32::NEG_INFINITY, 65_520.0] {
        let case = SearchCase { last: Some(last), ..one };
        runner.refuse(&format!("target {last}"), &case, Refusal::Value("targets"));
    }
}
