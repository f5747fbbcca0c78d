//! Launching an attention: the choice of the kernel, splits and their join.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::attention::KvPages;
use marlin_ops::{Result, Tensor};

use super::flash::{FlashConfig, GeometryLaunch, flash};
use super::join::join;
use super::rows::{Codes, Rows};
use super::tensor::{Fragments, LEAST_KEYS};
use super::tile::AttentionKernel;
use crate::element::Storage;
use crate::launch::{UNITS, cubes, units};
use crate::step::planned_keys;
use crate::{Buffer, Gpu};

/// Cubes that keep one multiprocessor busy.
const CUBES_PER_PROCESSOR: usize = 8;
/// Multiprocessors of a device that does not tell.
const USUAL_PROCESSORS: usize = 16;

/// Rows of keys or values: `[B, Hkv, capacity, stride]`, of which the first `width` columns count; or such blocks.
pub(super) struct Source<'a, R: Runtime> {
    tensor: &'a Tensor<Gpu<R>>,
    scales: Option<&'a Tensor<Gpu<R>>>,
    rows: Rows,
    stride: usize,
    width: usize,
}

impl<'a, R: Runtime> Source<'a, R> {
    pub(super) fn floats(tensor: &'a Tensor<Gpu<R>>, stride: usize, width: usize) -> Self {
        let rows = Rows::new(Codes::of(tensor.dtype()), stride, width);
        Self { tensor, scales: None, rows, stride, width }
    }

    pub(super) fn pages(pages: &'a KvPages<Gpu<R>>) -> Self {
        let (format, width) = (pages.format(), pages.width());
        let stride = format.row_elements(width) * format.per_element();
        let rows = Rows::new(Codes::of_format(format), stride, stride);
        Self { tensor: pages.data(), scales: pages.scales(), rows, stride, width }
    }
}

/// The blocks that rows lie in: `[B, width]` of ids below `count`.
pub(super) struct Table<'a, R: Runtime> {
    pub(super) ids: &'a Tensor<Gpu<R>>,
    pub(super) count: usize,
}

/// A checked attention. Query heads `first_head..first_head + kv_heads * group` of `heads` are computed.
pub(super) struct Attend<'a, R: Runtime> {
    pub(super) q: &'a Tensor<Gpu<R>>,
    pub(super) keys: Source<'a, R>,
    pub(super) values: Source<'a, R>,
    pub(super) kv_len: &'a [usize],
    pub(super) batch: usize,
    pub(super) queries: usize,
    pub(super) heads: usize,
    pub(super) first_head: usize,
    pub(super) kv_heads: usize,
    pub(super) group: usize,
    /// Rows of a sequence or of a block.
    pub(super) capacity: usize,
    pub(super) table: Option<Table<'a, R>>,
    pub(super) left: i32,
    pub(super) right: i32,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) mask: Option<&'a Tensor<Gpu<R>>>,
    pub(super) sinks: Option<&'a Tensor<Gpu<R>>>,
    pub(super) empty_is_error: bool,
    /// Absent: chosen here.
    pub(super) kernel: Option<AttentionKernel>,
    pub(super) out: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Attend<'_, R> {
    pub(super) fn run(&self, operation: &'static str, gpu: &Gpu<R>) -> Result<()> {
        if self.values.width == 0 {
            return Ok(());
        }
        let kv_len = gpu.length_words(operation, self.kv_len)?;
        let (kernel, tensor) = self.kernel.map_or_else(|| self.choose(gpu), |kernel| (kernel, None));
        if kernel.splits == 1 {
            self.launch(gpu, kernel, tensor, &kv_len, self.out, None);
            return Ok(());
        }
        let rows = self.batch * self.queries * self.heads;
        let partial = gpu.scratch(operation, DType::F32, &[rows, kernel.splits, self.values.width])?;
        let sums = gpu.scratch(operation, DType::F32, &[rows, kernel.splits, 2])?;
        self.launch(gpu, kernel, tensor, &kv_len, &partial, Some(&sums));
        self.join(gpu, kernel.splits, &partial, &sums);
        Ok(())
    }

    /// Tensor cores for what they take, else a tile for the number of rows; while the device has room for more cubes, ranges of
    /// keys.
    fn choose(&self, gpu: &Gpu<R>) -> (AttentionKernel, Option<Fragments>) {
        let hardware = &gpu.properties().hardware;
        let processors = hardware.num_streaming_multiprocessors.map_or(USUAL_PROCESSORS, |n| n as usize);
        let rows = self.queries * self.group;
        let io = [self.q.dtype(), self.out.dtype()].map(Codes::of);
        let cache = [self.keys.rows.codes, self.values.rows.codes];
        let tensor = Fragments::new(gpu, io, cache, [self.keys.width, self.values.width], rows);
        let kernel = tensor.map_or_else(|| AttentionKernel::for_rows(rows), |(_, kernel)| kernel);
        // Splits are compiled in, and part of a recorded step.
        let keys = planned_keys(self.kv_len.iter().copied().max().unwrap_or(0));
        let visible = (self.left as usize).saturating_add(self.right as usize).saturating_add(self.queries);
        let cubes = self.batch * self.kv_heads * rows.div_ceil(kernel.q_tile);
        let tensor = tensor.map(|(fragments, _)| fragments);
        let wanted = processors * tensor.map_or(CUBES_PER_PROCESSOR, Fragments::cubes_per_processor);
        let least = tensor.map_or(kernel.kv_tile, |_| LEAST_KEYS);
        (kernel.with_splits(cubes, keys.min(visible), least, wanted), tensor)
    }

    /// The kernel itself, to `out`, or to partial sums when `sums` is there.
    fn launch(
        &self,
        gpu: &Gpu<R>,
        kernel: AttentionKernel,
        tensor: Option<Fragments>,
        kv_len: &Buffer,
        out: &Tensor<Gpu<R>>,
        sums: Option<&Tensor<Gpu<R>>>,
    ) {
        let (head_dim, value_dim) = (self.keys.width, self.values.width);
        let plane = gpu.properties().hardware.plane_size_min as usize;
        let sinks = if sums.is_some() { None } else { self.sinks };
        let config = FlashConfig {
            q: Rows::new(Codes::of(self.q.dtype()), head_dim, head_dim),
            k: self.keys.rows,
            v: self.values.rows,
            sinks: sinks.map(|sinks| Storage::of(sinks.dtype())),
            out: Storage::of(out.dtype()),
            kernel,
            value_chunks: value_dim.div_ceil(kernel.chunk),
            lanes: (UNITS as usize / kernel.q_tile).min(plane).min(8),
            mask: self.mask.is_some(),
            softcap: self.softcap.is_some(),
            paged: self.table.is_some(),
            tensor,
        };
        let units = tensor.map_or(UNITS as usize, Fragments::units);
        let operand = tensor.map_or(Storage::F32.elem(), Fragments::elem);
        let blocks = (self.queries * self.group).div_ceil(kernel.q_tile);
        let (mask_batch, mask_head, mask_keys) = self.mask.map_or((0, 0, 0), |mask| {
            let dims = mask.dims();
            // Distances in planes of `[Sq, Sk]`; 0 where the mask is shared.
            (if dims[0] == 1 { 0 } else { dims[1] }, usize::from(dims[1] > 1), dims[3])
        });
        let geometry = GeometryLaunch::new(
            self.batch as u32,
            self.queries as u32,
            self.heads as u32,
            self.first_head as u32,
            self.kv_heads as u32,
            self.group as u32,
            head_dim as u32,
            value_dim as u32,
            self.capacity as u32,
            self.table.as_ref().map_or(0, |table| table.ids.columns()) as u32,
            self.table.as_ref().map_or(0, |table| table.count) as u32,
            self.keys.stride as u32,
            self.values.stride as u32,
            blocks as u32,
            self.left,
            self.right,
            self.scale,
            self.softcap.unwrap_or(0.0),
            mask_batch as u32,
            mask_head as u32,
            mask_keys as u32,
            u32::from(self.empty_is_error),
        );
        let words =
            |tensor: &Tensor<Gpu<R>>, rows: Rows| tensor.buffer().arg(tensor.size_in_bytes().div_ceil(4 * rows.line));
        let whole = |tensor: Option<&Tensor<Gpu<R>>>| match tensor {
            Some(tensor) => tensor.buffer().arg(tensor.elements()),
            None => gpu.unread(),
        };
        // SAFETY: the operands have the shapes that `geometry` says, as checked; buffers hold whole lines of words, and
        // the kernel reads no row outside them, whatever the table says.
        unsafe {
            flash::launch_unchecked::<R>(
                gpu.client(),
                cubes(self.batch * self.kv_heads * blocks * kernel.splits),
                CubeDim::new_1d(units as u32),
                config.q.line,
                config.k.line,
                config.v.line,
                words(self.q, config.q),
                words(self.keys.tensor, config.k),
                words(self.values.tensor, config.v),
                whole(self.keys.scales),
                whole(self.values.scales),
                whole(self.table.as_ref().map(|table| table.ids)),
                kv_len.arg(self.batch),
                whole(self.mask),
                whole(sinks),
                whole(Some(out)),
                whole(sums),
                gpu.faults(),
                geometry,
                config,
                [config.sinks.unwrap_or(Storage::F32).elem(), config.out.elem(), operand],
            );
        }
    }

    fn join(&self, gpu: &Gpu<R>, splits: usize, partial: &Tensor<Gpu<R>>, sums: &Tensor<Gpu<R>>) {
        let rows = self.batch * self.queries * self.heads;
        let sinks = self.sinks.map(|sinks| Storage::of(sinks.dtype()));
        let out = Storage::of(self.out.dtype());
        // SAFETY: `partial` and `sums` hold `splits` parts of every row, `out` one; splits are at most the units of a cube.
        unsafe {
            join::launch_unchecked::<R>(
                gpu.client(),
                cubes(rows),
                units(),
                partial.buffer().arg(partial.elements()),
                sums.buffer().arg(sums.elements()),
                self.sinks.map_or_else(|| gpu.unread(), |sinks| sinks.buffer().arg(sinks.elements())),
                self.out.buffer().arg(self.out.elements()),
                gpu.faults(),
                rows as u32,
                self.heads as u32,
                splits as u32,
                self.values.width as u32,
                u32::from(self.empty_is_error),
                sinks,
                out,
                [sinks.unwrap_or(Storage::F32).elem(), out.elem()],
            );
        }
    }
}
