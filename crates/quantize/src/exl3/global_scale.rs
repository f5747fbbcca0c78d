//! The scale at which a codebook represents the normalized weight best.

use half::f16;
use marlin_formats::exl3::tile::{SIDE, WEIGHTS};
use marlin_ops::trellis::{Path, Tile};
use rayon::prelude::*;

use super::incoherence::Inner;
use super::search::Search;
use crate::Result;

/// Tiles across the diagonal of the sample.
const WIDTH: usize = 3;
/// The fewest tiles taken from each end of the order of their sizes.
const EXTREMES: usize = 8;
/// Distance of the fine scales.
const STEP: f32 = 0.075;
/// The smallest scale.
const SMALLEST: f32 = 0.01;

/// The scale with the least mean squared error over a sample of tiles: a coarse grid on a third of them, a fine grid around
/// its best scale, then the vertex of a parabola.
pub(super) fn find(search: &Search<'_>, inner: &Inner) -> Result<f32> {
    let sample = sample(inner);
    let third: Vec<_> = sample.iter().copied().step_by(3).collect();
    let coarse: [f32; 10] = std::array::from_fn(|i| 0.1 + 0.2 * i as f32);
    let errors = mean_errors(search, &third, &coarse)?;
    let center = coarse[smallest(&errors)];
    let fine: [f32; 5] = std::array::from_fn(|i| (center + STEP * (i as f32 - 2.0)).max(SMALLEST));
    let errors = mean_errors(search, &sample, &fine)?;
    let best = smallest(&errors);
    if best == 0 || best == fine.len() - 1 {
        return Ok(fine[best]);
    }
    let [before, least, after] = [errors[best - 1], errors[best], errors[best + 1]];
    let curvature = before - 2.0 * least + after;
    let offset = if curvature > 0.0 { (0.5 * (before - after) / curvature).clamp(-0.5, 0.5) } else { 0.0 };
    Ok((fine[best] + offset as f32 * STEP).max(SMALLEST))
}

/// The first of the smallest errors.
fn smallest(errors: &[f64]) -> usize {
    (0..errors.len()).fold(0, |best, i| if errors[i] < errors[best] { i } else { best })
}

/// A wrapped diagonal of the grid of tiles, then the smallest and the largest tiles.
fn sample(inner: &Inner) -> Vec<Tile> {
    let (rows, columns) = (inner.rows / SIDE, inner.columns / SIDE);
    let length = rows.max(columns);
    let diagonal = (0..length * WIDTH).map(|i| (i / WIDTH % rows, (i / WIDTH + i % WIDTH) % columns));

    let size = |i: usize| inner.tile(i / columns, i % columns).iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
    let mut sizes: Vec<(f64, usize)> = (0..rows * columns).into_par_iter().map(|i| (size(i), i)).collect();
    sizes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let extremes = EXTREMES.max(length * 3 / 16).min(sizes.len().div_ceil(2));
    let ends = sizes[..extremes].iter().chain(&sizes[sizes.len() - extremes..]);

    diagonal.chain(ends.map(|&(_, i)| (i / columns, i % columns))).map(|(a, c)| inner.tile(a, c)).collect()
}

/// Mean squared error of the tiles when encoded at each scale and scaled back; infinite where a target is.
fn mean_errors(search: &Search<'_>, tiles: &[Tile], scales: &[f32]) -> Result<Vec<f64>> {
    let mean_error = |&scale: &f32| -> Result<f64> {
        let targets: Vec<Tile> = tiles.iter().map(|tile| tile.map(|w| w * scale)).collect();
        if targets.as_flattened().iter().any(|&w| !f16::from_f32(w).is_finite()) {
            return Ok(f64::INFINITY);
        }
        let batch = search.batch(targets.len());
        let paths: Vec<_> = targets.par_chunks(batch).map(|targets| search.paths(targets)).collect::<Result<_>>()?;
        let difference = |(&word, &w): (&u16, &f32)| f64::from(search.value(word) / scale) - f64::from(w);
        let error =
            |(path, tile): (&Path, &Tile)| path.iter().zip(tile).map(|pair| difference(pair).powi(2)).sum::<f64>();
        Ok(paths.iter().flatten().zip(tiles).map(error).sum::<f64>() / (tiles.len() * WEIGHTS) as f64)
    };
    scales.iter().map(mean_error).collect()
}
