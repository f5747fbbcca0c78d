//! Logits as words that order as they do, and reductions of words over a cube.

use cubecl::prelude::*;

/// The key of a logit that must not occur; above all others.
pub(super) const BAD: u32 = u32::MAX;

/// The key of -inf.
pub(super) const BANNED: u32 = 0x007f_ffff;

/// A word that grows with the logit; -0 equals +0, [`BAD`] for NaN and +inf.
#[cube]
pub(super) fn key_of(logit: f32) -> u32 {
    let bits = u32::reinterpret(logit);
    let magnitude = bits & 0x7fff_ffffu32;
    let negative = bits > 0x8000_0000u32;
    let key = select(negative, !bits, magnitude | 0x8000_0000u32);
    let bad = magnitude > 0x7f80_0000u32 || bits == 0x7f80_0000u32;
    select(bad, BAD.runtime(), key)
}

/// The logit of a key that is not bad.
#[cube]
pub(super) fn logit_of(key: u32) -> f32 {
    f32::reinterpret(select(key >= 0x8000_0000u32, key & 0x7fff_ffffu32, !key))
}

/// The largest word of all units, known to each of them; `planes` is at least the number of planes.
#[cube]
#[allow(clippy::manual_is_multiple_of)] // Kernels have no such method.
pub(super) fn cube_max_word(value: u32, #[comptime] planes: usize) -> u32 {
    let mut partial = Shared::<[u32]>::new_slice(planes);
    let max = plane_max(value);
    if UNIT_POS % PLANE_DIM == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = max;
    }
    sync_cube();
    let mut total = partial[0];
    for plane in 1..CUBE_DIM.div_ceil(PLANE_DIM) {
        let other = partial[plane as usize];
        total = select(other > total, other, total);
    }
    // The memory may be written again at once.
    sync_cube();
    total
}
