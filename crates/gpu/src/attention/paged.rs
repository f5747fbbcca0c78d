//! Caches of blocks: attention over them, and writing rows in every cache format.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::attention::{EmptyRow, KvPages, PADDING, PagedAttentionArgs, PagedWriteArgs, block_error};
use marlin_ops::{Result, Tensor};

use super::attend::{Attend, Source, Table};
use super::rows::{Codes, scale_value};
use super::tile::AttentionKernel;
use super::visible;
use crate::element::{Storage, load, store};
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, units};
use crate::reduce::{cube_max, max_of};
use crate::{Buffer, Gpu};

pub(super) fn attention<R: Runtime>(
    gpu: &Gpu<R>,
    args: PagedAttentionArgs<'_, Gpu<R>>,
    kernel: Option<AttentionKernel>,
) -> Result<()> {
    let &[batch, queries, heads, _] = args.q.dims() else { unreachable!("q was checked to have 4 dimensions") };
    let [count, kv_heads, block_size] = args.keys.shape();
    // The kernel looks at block 0 in place of one that does not exist.
    if let (0, Some(b)) = (count, args.kv_len.iter().position(|len| *len > 0)) {
        return Err(block_error(b * args.block_table.columns()));
    }
    let (left, right) = visible(args.causal, args.window);
    let attend = Attend {
        q: args.q,
        keys: Source::pages(args.keys),
        values: Source::pages(args.values),
        kv_len: args.kv_len,
        batch,
        queries,
        heads,
        first_head: 0,
        kv_heads,
        group: heads / kv_heads,
        capacity: block_size,
        table: Some(Table { ids: args.block_table, count }),
        left,
        right,
        scale: args.scale,
        softcap: args.softcap,
        mask: None,
        sinks: args.sinks,
        empty_is_error: args.empty_row == EmptyRow::Error,
        kernel,
        out: args.out,
    };
    attend.run("paged_attention", gpu)
}

pub(super) fn write<R: Runtime>(gpu: &Gpu<R>, args: PagedWriteArgs<'_, Gpu<R>>) -> Result<()> {
    let slots = gpu.create_u32("paged_write", args.slots)?;
    for (x, pages, fault) in [(args.k, args.keys, Fault::KeyRow), (args.v, args.values, Fault::ValueRow)] {
        if x.elements() == 0 {
            continue;
        }
        if pages.format().is_quantized() {
            launch_codes(gpu, x, &slots, pages, fault);
        } else {
            launch_floats(gpu, x, &slots, pages);
        }
    }
    Ok(())
}

fn launch_floats<R: Runtime>(gpu: &Gpu<R>, x: &Tensor<Gpu<R>>, slots: &Buffer, pages: &KvPages<Gpu<R>>) {
    let [_, heads, block_size] = pages.shape();
    let storage = [Storage::of(x.dtype()), Storage::of(pages.data().dtype())];
    // SAFETY: x holds T * Hkv rows and there are T slots, all within the blocks, as checked.
    unsafe {
        write_floats::launch_unchecked::<R>(
            gpu.client(),
            cubes(x.rows()),
            units(),
            x.buffer().arg(x.elements()),
            slots.arg(x.dims()[0]),
            pages.data().buffer().arg(pages.data().elements()),
            x.rows() as u32,
            heads as u32,
            pages.width() as u32,
            block_size as u32,
            storage,
            storage.map(Storage::elem),
        );
    }
}

fn launch_codes<R: Runtime>(gpu: &Gpu<R>, x: &Tensor<Gpu<R>>, slots: &Buffer, pages: &KvPages<Gpu<R>>, fault: Fault) {
    let [_, heads, block_size] = pages.shape();
    let Some(scales) = pages.scales() else { return };
    let storage = Storage::of(x.dtype());
    // SAFETY: x holds T * Hkv rows and there are T slots, all within the blocks, as checked.
    unsafe {
        write_codes::launch_unchecked::<R>(
            gpu.client(),
            cubes(x.rows()),
            units(),
            x.buffer().arg(x.elements()),
            slots.arg(x.dims()[0]),
            pages.data().buffer().arg(pages.data().elements()),
            scales.buffer().arg(scales.elements()),
            gpu.faults(),
            x.rows() as u32,
            heads as u32,
            pages.width() as u32,
            block_size as u32,
            pages.format().largest(),
            Codes::of_format(pages.format()),
            fault,
            storage,
            storage.elem(),
        );
    }
}

/// The row that slot `slot` has for a head.
#[cube]
fn slot_row(slot: u32, head: usize, heads: usize, block_size: usize) -> usize {
    let slot = slot as usize;
    (slot / block_size * heads + head) * block_size + slot % block_size
}

/// `[T, Hkv, width]` to the rows of their slots; one cube a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn write_floats<X: Numeric, C: Numeric>(
    x: &[X],
    slots: &[u32],
    cache: &mut [C],
    rows: u32,
    heads: u32,
    width: u32,
    block_size: u32,
    #[comptime] storage: [Storage; 2],
    #[define(X, C)] _elements: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let heads = heads as usize;
        let width = width as usize;
        let slot = slots[row / heads];
        if slot != PADDING {
            let out = slot_row(slot, row % heads, heads, block_size as usize) * width;
            let mut i = UNIT_POS as usize;
            while i < width {
                let value = load::<X>(x, row * width + i, comptime!(storage[0]));
                store::<C>(cache, out + i, value, comptime!(storage[1]));
                i += UNITS as usize;
            }
        }
    }
}

/// `[T, Hkv, width]`, quantized, to the rows of their slots; one cube a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn write_codes<X: Numeric>(
    x: &[X],
    slots: &[u32],
    words: &mut [u32],
    scales: &mut [u16],
    faults: &mut [Atomic<u32>],
    rows: u32,
    heads: u32,
    width: u32,
    block_size: u32,
    largest: f32,
    #[comptime] codes: Codes,
    #[comptime] fault: Fault,
    #[comptime] storage: Storage,
    #[define(X)] _element: ElemType,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let heads = heads as usize;
        let width = width as usize;
        let slot = slots[row / heads];
        let mut amax = f32::new(0.0);
        let mut unstorable = f32::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < width {
            let bits = u32::reinterpret(load::<X>(x, row * width + i, storage)) & 0x7fff_ffffu32;
            if bits >= 0x7f80_0000u32 {
                unstorable = 1.0f32;
            } else {
                amax = max_of(amax, f32::reinterpret(bits));
            }
            i += UNITS as usize;
        }
        let amax = cube_max(amax, UNITS as usize);
        let unstorable = cube_max(unstorable, UNITS as usize);
        let bits = half_bits(divide(amax, largest));
        let bits = select(amax > 0.0f32 && bits == 0u32, 1u32.runtime(), bits);
        if slot != PADDING {
            if UNIT_POS == 0 && (unstorable > 0.0f32 || bits >= 0x7c00u32) {
                record(faults, fault, row);
            }
            let place = slot_row(slot, row % heads, heads, block_size as usize);
            let scale = scale_value(u16::cast_from(bits));
            if UNIT_POS == 0 {
                scales[place] = u16::cast_from(bits);
            }
            let per_word = comptime!(codes.per_word());
            let row_words = width.div_ceil(per_word);
            let mut i = UNIT_POS as usize;
            while i < row_words {
                let mut word = 0u32.runtime();
                #[unroll]
                for part in 0..per_word {
                    let column = i * per_word + part;
                    let mut t = f32::new(0.0);
                    if column < width && scale > 0.0f32 {
                        t = divide(load::<X>(x, row * width + column, storage), scale);
                    }
                    word = word | (code_of(t, codes) << comptime!(part as u32 * codes.bits()));
                }
                words[place * row_words + i] = word;
                i += UNITS as usize;
            }
        }
    }
}

/// a / b, rounded to nearest: devices divide within a few ulps.
#[cube]
fn divide(a: f32, b: f32) -> f32 {
    let q = a / b;
    q + fma(-q, b, a) / b
}

/// The nearest integer, ties to even.
#[cube]
fn round_even(x: f32) -> f32 {
    let low = f32::floor(x);
    let rest = x - low;
    let odd = low - 2.0f32 * f32::floor(low * 0.5f32) == 1.0f32;
    select(rest > 0.5f32 || (rest == 0.5f32 && odd), low + 1.0f32, low)
}

/// The bits of the f16 nearest to x >= 0, ties to even; at least 0x7c00 beyond its range.
#[cube]
fn half_bits(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let usual = ((bits + 0xfffu32 + ((bits >> 13u32) & 1u32)) >> 13u32) - 0x1_c000u32;
    let tiny = u32::cast_from(round_even(x * 16_777_216.0f32));
    select(bits < 0x3880_0000u32, tiny, usual)
}

/// The code nearest to a value, ties to even, saturated.
#[cube]
fn code_of(t: f32, #[comptime] codes: Codes) -> u32 {
    let size = f32::abs(t);
    let sign = u32::reinterpret(t) >> 31u32;
    match comptime!(codes) {
        Codes::Int8 => {
            let whole = clamp(round_even(t), -127.0f32, 127.0f32);
            u32::cast_from(i32::cast_from(whole)) & 0xffu32
        }
        Codes::Int4 => u32::cast_from(clamp(round_even(t), -8.0f32, 7.0f32) + 8.0f32),
        Codes::Fp4 => {
            // Each boundary belongs to the even neighbour, hence the alternating comparison.
            let code = u32::cast_from(size > 0.25f32)
                + u32::cast_from(size >= 0.75f32)
                + u32::cast_from(size > 1.25f32)
                + u32::cast_from(size >= 1.75f32)
                + u32::cast_from(size > 2.5f32)
                + u32::cast_from(size >= 3.5f32)
                + u32::cast_from(size > 5.0f32);
            code | (sign << 3u32)
        }
        Codes::Fp8 => {
            let bits = u32::reinterpret(size);
            let usual = ((bits + 0x7_ffffu32 + ((bits >> 20u32) & 1u32)) >> 20u32) - 0x3c0u32;
            let tiny = u32::cast_from(round_even(size * 512.0f32));
            // Below 2^-6 steps are equal.
            let code = select(bits < 0x3c80_0000u32, tiny, usual);
            select(code > 0x7eu32, 0x7eu32.runtime(), code) | (sign << 7u32)
        }
        // Floats have no codes.
        Codes::F32 | Codes::F16 | Codes::BF16 => u32::reinterpret(t),
    }
}

#[cube]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = select(x < low, low, x);
    select(x > high, high, x)
}
