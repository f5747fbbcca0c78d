//! Rows into caches.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::attention::KvWriteArgs;
use marlin_ops::{Result, Tensor};

use crate::Gpu;
use crate::element::{Storage, load, store};
use crate::launch::{cubes_for, units};

/// `[T, Hkv, width]` to rows `start[0]..start[0] + T` of sequence `sequence` of `[B, Hkv, capacity, width]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn write_rows<X: Numeric, C: Numeric>(
    x: &[X],
    start: &[u32],
    cache: &mut [C],
    count: u32,
    heads: u32,
    width: u32,
    capacity: u32,
    sequence: u32,
    #[comptime] storage: [Storage; 2],
    #[define(X, C)] _elements: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i < count as usize {
        let width = width as usize;
        let heads = heads as usize;
        let column = i % width;
        let row = i / width;
        let slot = (sequence as usize * heads + row % heads) * capacity as usize + start[0] as usize + row / heads;
        store::<C>(cache, slot * width + column, load::<X>(x, i, comptime!(storage[0])), comptime!(storage[1]));
    }
}

pub(super) fn kv_write<R: Runtime>(gpu: &Gpu<R>, args: KvWriteArgs<'_, Gpu<R>>) -> Result<()> {
    let start = gpu.start_word("kv_write", args.start)?;
    let write = |x: &Tensor<Gpu<R>>, cache: &Tensor<Gpu<R>>| {
        let count = x.elements();
        if count == 0 {
            return;
        }
        let storage = [Storage::of(x.dtype()), Storage::of(cache.dtype())];
        // SAFETY: the rows lie within the cache, as checked; units beyond `count` do nothing.
        unsafe {
            write_rows::launch_unchecked::<R>(
                gpu.client(),
                cubes_for(count),
                units(),
                x.buffer().arg(count),
                start.arg(1),
                cache.buffer().arg(cache.elements()),
                count as u32,
                x.dims()[1] as u32,
                x.dims()[2] as u32,
                cache.dims()[2] as u32,
                args.sequence as u32,
                storage,
                storage.map(Storage::elem),
            );
        }
    };
    write(args.k, args.k_cache);
    write(args.v, args.v_cache);
    Ok(())
}
