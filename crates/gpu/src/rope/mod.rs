//! Rotary position embeddings.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::rope::{MlaLatentWriteArgs, Pairing, RopeArgs};
use marlin_ops::{Device, OpError, Result, RopeOps};

use crate::Gpu;
use crate::element::{Storage, load, store, widen};
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, cubes_for, units};
use crate::reduce::cube_sum;

/// Where the channels of a pair are read and written.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Order {
    Interleaved,
    Half,
    InterleavedToHalf,
}

impl Order {
    fn of(pairing: Pairing) -> Self {
        match pairing {
            Pairing::Interleaved => Self::Interleaved,
            Pairing::Half => Self::Half,
            Pairing::InterleavedToHalf => Self::InterleavedToHalf,
        }
    }

    /// Pairs are read as `(2i, 2i+1)`, not as `(i, i + half)`.
    fn reads_neighbours(self) -> bool {
        self != Self::Half
    }

    /// Pairs are written as `(2i, 2i+1)`.
    fn writes_neighbours(self) -> bool {
        self == Self::Interleaved
    }
}

/// The first channel of pair `i`.
#[cube]
fn first(i: usize, #[comptime] neighbours: bool) -> usize {
    if comptime!(neighbours) { 2usize * i } else { i }
}

/// The second channel of pair `i` of `half`.
#[cube]
fn second(i: usize, half: usize, #[comptime] neighbours: bool) -> usize {
    if comptime!(neighbours) { 2usize * i + 1usize } else { i + half }
}

/// Pairs that are written where they were read: one unit a pair of `x [T, H, D]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_in_place<X: Numeric>(
    x: &mut [X],
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    faults: &mut [Atomic<u32>],
    pairs: u32,
    half: u32,
    heads: u32,
    head_dim: u32,
    offset: u32,
    table_rows: u32,
    sign: f32,
    #[comptime] order: Order,
    #[comptime] storage: Storage,
    #[define(X)] _element: ElemType,
) {
    if ABSOLUTE_POS < pairs as usize {
        let half = half as usize;
        let i = ABSOLUTE_POS % half;
        let vector = ABSOLUTE_POS / half;
        let token = vector / heads as usize;
        let position = positions[token];
        if position < table_rows {
            let at = vector * head_dim as usize + offset as usize;
            let a_at = at + first(i, comptime!(order.reads_neighbours()));
            let b_at = at + second(i, half, comptime!(order.reads_neighbours()));
            let a = widen::<X>(x[a_at], storage);
            let b = widen::<X>(x[b_at], storage);
            let c = cos[position as usize * half + i];
            let s = sign * sin[position as usize * half + i];
            store::<X>(x, a_at, a * c - b * s, storage);
            store::<X>(x, b_at, b * c + a * s, storage);
        } else {
            record(faults, comptime!(Fault::RopePosition), token);
        }
    }
}

/// Most rotated channels where pairs change place.
const MOST_MOVED: usize = 4096;

/// Pairs that change place: one cube a vector of `x [T, H, D]`, which it reads whole before it writes.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_and_move<X: Numeric>(
    x: &mut [X],
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    faults: &mut [Atomic<u32>],
    vectors: u32,
    half: u32,
    heads: u32,
    head_dim: u32,
    offset: u32,
    table_rows: u32,
    sign: f32,
    #[comptime] order: Order,
    #[comptime] storage: Storage,
    #[define(X)] _element: ElemType,
) {
    let mut old = Shared::<[f32]>::new_slice(MOST_MOVED);
    let vector = CUBE_POS;
    if vector < vectors as usize {
        let half = half as usize;
        let token = vector / heads as usize;
        let position = positions[token];
        let at = vector * head_dim as usize + offset as usize;
        if position < table_rows {
            let mut i = UNIT_POS as usize;
            while i < 2usize * half {
                old[i] = widen::<X>(x[at + i], storage);
                i += UNITS as usize;
            }
            sync_cube();
            let mut i = UNIT_POS as usize;
            while i < half {
                let a = old[first(i, comptime!(order.reads_neighbours()))];
                let b = old[second(i, half, comptime!(order.reads_neighbours()))];
                let c = cos[position as usize * half + i];
                let s = sign * sin[position as usize * half + i];
                let neighbours = comptime!(order.writes_neighbours());
                store::<X>(x, at + first(i, neighbours), a * c - b * s, storage);
                store::<X>(x, at + second(i, half, neighbours), b * c + a * s, storage);
                i += UNITS as usize;
            }
        } else if UNIT_POS == 0 {
            record(faults, comptime!(Fault::RopePosition), token);
        }
    }
}

/// What [`latent_rows`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct LatentConfig {
    x: Storage,
    gamma: Option<Storage>,
    cache: Storage,
    order: Order,
}

/// `cache[first_row + start[0] + t] = [rms_norm(x[t, ..rank]) | rope(x[t, rank..])]`: one cube a token.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn latent_rows<X: Numeric, G: Numeric, C: Numeric>(
    x: &[X],
    gamma: &[G],
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    start: &[u32],
    cache: &mut [C],
    faults: &mut [Atomic<u32>],
    tokens: u32,
    rank: u32,
    half: u32,
    table_rows: u32,
    first_row: u32,
    eps: f32,
    #[comptime] config: LatentConfig,
    #[define(X, G, C)] _elements: [ElemType; 3],
) {
    let token = CUBE_POS;
    if token < tokens as usize {
        let half = half as usize;
        let count = rank as usize;
        let width = count + 2usize * half;
        let from = token * width;
        let to = (first_row as usize + start[0] as usize + token) * width;
        let position = positions[token];
        if position < table_rows {
            let mut r = f32::new(1.0);
            if comptime!(config.gamma.is_some()) {
                let mut squares = f32::new(0.0);
                let mut i = UNIT_POS as usize;
                while i < count {
                    let v = load::<X>(x, from + i, config.x);
                    squares += v * v;
                    i += UNITS as usize;
                }
                r = 1.0f32 / f32::sqrt(cube_sum(squares, UNITS as usize) / f32::cast_from(rank) + eps);
            }
            let mut i = UNIT_POS as usize;
            while i < count {
                let mut v = load::<X>(x, from + i, config.x);
                if comptime!(config.gamma.is_some()) {
                    v = v * r * load::<G>(gamma, i, comptime!(config.gamma.unwrap_or(Storage::F32)));
                }
                store::<C>(cache, to + i, v, config.cache);
                i += UNITS as usize;
            }
            let mut i = UNIT_POS as usize;
            while i < half {
                let reads = comptime!(config.order.reads_neighbours());
                let writes = comptime!(config.order.writes_neighbours());
                let a = load::<X>(x, from + count + first(i, reads), config.x);
                let b = load::<X>(x, from + count + second(i, half, reads), config.x);
                let c = cos[position as usize * half + i];
                let s = sin[position as usize * half + i];
                store::<C>(cache, to + count + first(i, writes), a * c - b * s, config.cache);
                store::<C>(cache, to + count + second(i, half, writes), b * c + a * s, config.cache);
                i += UNITS as usize;
            }
        } else if UNIT_POS == 0 {
            record(faults, comptime!(Fault::RopePosition), token);
        }
    }
}

impl<R: Runtime> RopeOps for Gpu<R> {
    fn run_rope(&self, args: RopeArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rope";
        let order = Order::of(args.pairing);
        let (heads, head_dim, half) = (args.x.dims()[1], args.x.dims()[2], args.table.cos.columns());
        let vectors = args.x.dims()[0] * heads;
        let storage = Storage::of(args.x.dtype());
        macro_rules! launch {
            ($kernel:ident, $cubes:expr, $count:expr) => {
                // SAFETY: x holds `vectors` times head_dim elements, of which each has 2 half from `offset` on, the
                // tables `positions` times half; the kernel compares positions and its count before any access.
                unsafe {
                    $kernel::launch_unchecked::<R>(
                        self.client(),
                        $cubes,
                        units(),
                        args.x.buffer().arg(args.x.elements()),
                        args.positions.buffer().arg(args.positions.elements()),
                        args.table.cos.buffer().arg(args.table.cos.elements()),
                        args.table.sin.buffer().arg(args.table.sin.elements()),
                        self.faults(),
                        $count as u32,
                        half as u32,
                        heads as u32,
                        head_dim as u32,
                        args.offset as u32,
                        args.table.positions() as u32,
                        if args.inverse { -1.0 } else { 1.0 },
                        order,
                        storage,
                        storage.elem(),
                    );
                }
            };
        }
        if order.reads_neighbours() == order.writes_neighbours() {
            launch!(rotate_in_place, cubes_for(vectors * half), vectors * half);
        } else if 2 * half <= MOST_MOVED {
            launch!(rotate_and_move, cubes(vectors), vectors);
        } else {
            let what = format!("{} rotated channels that change place, at most {MOST_MOVED}", 2 * half);
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        Ok(())
    }

    fn run_mla_latent_write(&self, args: MlaLatentWriteArgs<'_, Self>) -> Result<()> {
        let (tokens, half) = (args.x.rows(), args.table.cos.columns());
        let rank = args.x.columns() - 2 * half;
        // There is nothing to normalise in rows of angles alone.
        let gamma = args.gamma.filter(|_| rank > 0);
        let config = LatentConfig {
            x: Storage::of(args.x.dtype()),
            gamma: gamma.map(|gamma| Storage::of(gamma.dtype())),
            cache: Storage::of(args.cache.dtype()),
            order: Order::of(args.pairing),
        };
        let first_row = args.sequence * args.cache.dims()[1];
        let start = self.start_word("mla_latent_write", args.start)?;
        // SAFETY: the rows lie within x and the cache, as checked, gamma holds `rank` elements and the tables
        // `positions` times half; the kernel compares positions before any access.
        unsafe {
            latent_rows::launch_unchecked::<R>(
                self.client(),
                cubes(tokens),
                units(),
                args.x.buffer().arg(args.x.elements()),
                gamma.map_or_else(|| self.unread(), |gamma| gamma.buffer().arg(rank)),
                args.positions.buffer().arg(tokens),
                args.table.cos.buffer().arg(args.table.cos.elements()),
                args.table.sin.buffer().arg(args.table.sin.elements()),
                start.arg(1),
                args.cache.buffer().arg(args.cache.elements()),
                self.faults(),
                tokens as u32,
                rank as u32,
                half as u32,
                args.table.positions() as u32,
                first_row as u32,
                args.eps,
                config,
                [config.x.elem(), config.gamma.unwrap_or(Storage::F32).elem(), config.cache.elem()],
            );
        }
        Ok(())
    }
}
