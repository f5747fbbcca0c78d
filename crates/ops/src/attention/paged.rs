//! Attention over caches of blocks (operations.md section 3: attention_paged, kv_cache_write), in every cache format.
//!
//! Key t of sequence s lies in block `table[s, t / bs]`, row `t % bs`. A contiguous cache is one block a sequence.

use marlin_formats::DType;

use super::{EmptyRow, FAMILY, KvFormat, Window, visible_keys};
use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, OpError, Result, Tensor, check};

/// A slot that is not written: the token is padding.
pub const PADDING: u32 = u32::MAX;

/// Keys, or values, of all sequences.
pub struct KvPages<D: Device> {
    format: KvFormat,
    width: usize,
    /// `[blocks, Hkv, bs, row elements]`, [`KvFormat::dtype`].
    data: Tensor<D>,
    /// `[blocks, Hkv, bs]` F16 where the format is quantized.
    scales: Option<Tensor<D>>,
}

impl<D: Device> KvPages<D> {
    /// Zero-filled blocks `[blocks, Hkv, bs]` of rows of `width` values.
    ///
    /// # Errors
    /// A device error when they do not fit.
    pub fn new(device: &D, format: KvFormat, shape: [usize; 3], width: usize) -> Result<Self> {
        let [blocks, heads, block_size] = shape;
        let data = device.zeros(format.dtype(), &[blocks, heads, block_size, format.row_elements(width)])?;
        let scales = format.is_quantized().then(|| device.zeros(DType::F16, &shape)).transpose()?;
        Ok(Self { format, width, data, scales })
    }

    /// Blocks from their tensors: `data` `[blocks, Hkv, bs, row elements]`, `scales` `[blocks, Hkv, bs]` F16 if and only
    /// if the format is quantized.
    ///
    /// # Errors
    /// A shape or dtype error naming `data` or `scales`.
    pub fn from_tensors(format: KvFormat, width: usize, data: Tensor<D>, scales: Option<Tensor<D>>) -> Result<Self> {
        const OP: &str = "kv_pages";
        let &[blocks, heads, block_size, elements] = data.dims() else {
            return Err(OpError::shape(OP, "data", data.dims(), "[blocks, Hkv, bs, elements]"));
        };
        if elements != format.row_elements(width) {
            let expected = format!("[.., {}]", format.row_elements(width));
            return Err(OpError::shape(OP, "data", data.dims(), expected));
        }
        check::dtype(OP, "data", &data, format.dtype())?;
        match &scales {
            Some(scales) if format.is_quantized() => {
                check::dims(OP, "scales", scales, &[blocks, heads, block_size])?;
                check::dtype(OP, "scales", scales, DType::F16)?;
            }
            None if !format.is_quantized() => {}
            _ => return Err(OpError::value(OP, "scales", format!("do not go with {}", format.name()))),
        }
        Ok(Self { format, width, data, scales })
    }

    /// How rows are stored.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `[blocks, Hkv, bs]`.
    pub fn shape(&self) -> [usize; 3] {
        let dims = self.data.dims();
        [dims[0], dims[1], dims[2]]
    }

    /// The rows.
    pub fn data(&self) -> &Tensor<D> {
        &self.data
    }

    /// The scales of a quantized format.
    pub fn scales(&self) -> Option<&Tensor<D>> {
        self.scales.as_ref()
    }

    /// Rows and scales, for a backend that writes them.
    pub fn tensors_mut(&mut self) -> (&mut Tensor<D>, Option<&mut Tensor<D>>) {
        (&mut self.data, self.scales.as_mut())
    }

    /// Bytes of a row with its scale.
    fn row_bytes(&self) -> usize {
        let scale = if self.format.is_quantized() { 2 } else { 0 };
        self.format.row_elements(self.width) * self.format.dtype().size_in_bytes() + scale
    }
}

/// Writes rows to slots `block bs + row`; floats are rounded once, other formats quantized by
/// [`KvFormat::quantize`]. A value that is not finite, or too large for the scale, is an error in a quantized format.
pub struct PagedWriteArgs<'a, D: Device> {
    /// `[T, Hkv, D]`, after RoPE.
    pub k: &'a Tensor<D>,
    /// `[T, Hkv, Dv]`.
    pub v: &'a Tensor<D>,
    /// `[T]`, all different; [`PADDING`] writes nothing.
    pub slots: &'a [u32],
    /// Rows of D.
    pub keys: &'a mut KvPages<D>,
    /// Rows of Dv.
    pub values: &'a mut KvPages<D>,
}

/// [`super::AttentionArgs`] over blocks; query i of a sequence has the position `kv_len - Sq + i`.
pub struct PagedAttentionArgs<'a, D: Device> {
    /// `[B, Sq, Hq, D]`.
    pub q: &'a Tensor<D>,
    /// Rows of D.
    pub keys: &'a KvPages<D>,
    /// Rows of Dv, shape and format of `keys`.
    pub values: &'a KvPages<D>,
    /// `[B, most blocks]` U32; entries behind the last key are never read. An id of no block is an error.
    pub block_table: &'a Tensor<D>,
    /// Valid keys of each sequence, `[B]`. 0, with [`EmptyRow::Zero`] alone, gives rows of zeros.
    pub kv_len: &'a [usize],
    /// Usually `D^-1/2`.
    pub scale: f32,
    /// Hide keys after the query's position.
    pub causal: bool,
    /// Hide keys outside a window.
    pub window: Window,
    /// Above 0 when present.
    pub softcap: Option<f32>,
    /// `[Hq]` logits that take probability and add no value.
    pub sinks: Option<&'a Tensor<D>>,
    /// Queries without a visible key.
    pub empty_row: EmptyRow,
    /// `[B, Sq, Hq, Dv]`.
    pub out: &'a mut Tensor<D>,
}

/// Attention over blocks.
pub trait PagedAttentionOps: Device {
    /// Body of [`PagedAttentionOps::paged_write`]; arguments are checked.
    fn run_paged_write(&self, args: PagedWriteArgs<'_, Self>) -> Result<()>;

    /// Body of [`PagedAttentionOps::paged_attention`]; arguments are checked.
    fn run_paged_attention(&self, args: PagedAttentionArgs<'_, Self>) -> Result<()>;

    /// Writes rows of keys and values to slots.
    fn paged_write(&self, args: PagedWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "paged_write";
        check_write(OP, &args)?;
        if args.slots.is_empty() {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, PagedWriteArgs::cost, Self::run_paged_write)
    }

    /// Attention of new queries over blocks that already hold their keys.
    fn paged_attention(&self, args: PagedAttentionArgs<'_, Self>) -> Result<()> {
        const OP: &str = "paged_attention";
        check_attention(OP, &args)?;
        if args.q.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, PagedAttentionArgs::cost, Self::run_paged_attention)
    }
}

impl<D: Device> PagedWriteArgs<'_, D> {
    fn cost(&self) -> Cost {
        let mut cost = Cost::default().add_activations(&[self.k, self.v]);
        let rows = self.k.dims()[0] * self.k.dims()[1];
        cost.activation_bytes += (rows * (self.keys.row_bytes() + self.values.row_bytes())) as u64;
        cost
    }
}

impl<D: Device> PagedAttentionArgs<'_, D> {
    fn cost(&self) -> Cost {
        let (queries, q_heads, kv_heads) = (self.q.dims()[1], self.q.dims()[2], self.keys.shape()[1]);
        let (mut pairs, mut keys) = (0, 0);
        for &kv_len in self.kv_len {
            let range = |i: usize| visible_keys((i + kv_len).saturating_sub(queries), kv_len, self.causal, self.window);
            pairs += (0..queries).map(range).map(|(first, end)| end - first).sum::<usize>();
            keys += range(queries - 1).1 - range(0).0;
        }
        Cost::default()
            .add_flops(Arithmetic::F32, 2 * q_heads * pairs * (self.keys.width + self.values.width))
            .add_cache(keys * kv_heads * (self.keys.row_bytes() + self.values.row_bytes()))
            .add_weights(self.sinks.map_or(0, |sinks| sinks.size_in_bytes()))
            .add_activations(&[self.q, self.out])
    }
}

/// The error of a table entry that names no block.
pub fn block_error(index: usize) -> OpError {
    OpError::value("paged_attention", "block_table", format!("[{index}] is no block"))
}

/// The error of a row that a quantized format cannot hold.
pub fn unstorable_error(operand: &'static str, row: usize) -> OpError {
    let reason = format!("row {row} holds a value that is not finite, or too large for the scale");
    OpError::value("paged_write", operand, reason)
}

fn check_write<D: Device>(operation: &'static str, args: &PagedWriteArgs<'_, D>) -> Result<()> {
    let shape = args.keys.shape();
    if args.values.shape() != shape {
        return Err(OpError::shape(operation, "values", &args.values.shape(), format!("{shape:?}")));
    }
    let [blocks, heads, block_size] = shape;
    let tokens = args.slots.len();
    check::dims(operation, "k", args.k, &[tokens, heads, args.keys.width])?;
    check::dims(operation, "v", args.v, &[tokens, heads, args.values.width])?;
    check::float(operation, "k", args.k)?;
    check::float(operation, "v", args.v)?;
    let slots = blocks * block_size;
    let mut written: Vec<(u32, usize)> = Vec::with_capacity(tokens);
    for (i, &slot) in args.slots.iter().enumerate().filter(|(_, slot)| **slot != PADDING) {
        if slot as usize >= slots {
            return Err(OpError::value(operation, "slots", format!("[{i}] is {slot}, there are {slots}")));
        }
        written.push((slot, i));
    }
    written.sort_unstable();
    if let Some(pair) = written.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let reason = format!("[{}] and [{}] are both {}", pair[0].1, pair[1].1, pair[0].0);
        return Err(OpError::value(operation, "slots", reason));
    }
    Ok(())
}

fn check_attention<D: Device>(operation: &'static str, args: &PagedAttentionArgs<'_, D>) -> Result<()> {
    let &[batch, queries, q_heads, head_dim] = args.q.dims() else {
        return Err(OpError::shape(operation, "q", args.q.dims(), "[B, Sq, Hq, D]"));
    };
    let [blocks, kv_heads, block_size] = args.keys.shape();
    if args.keys.width != head_dim {
        let expected = format!("[{batch}, {queries}, {q_heads}, {}]", args.keys.width);
        return Err(OpError::shape(operation, "q", args.q.dims(), expected));
    }
    if kv_heads == 0 || q_heads % kv_heads != 0 || block_size == 0 {
        let expected = format!("[{blocks}, Hkv that divides Hq = {q_heads}, bs > 0, ..]");
        return Err(OpError::shape(operation, "keys", args.keys.data.dims(), expected));
    }
    if args.values.shape() != args.keys.shape() {
        let expected = format!("[{blocks}, {kv_heads}, {block_size}, ..]");
        return Err(OpError::shape(operation, "values", args.values.data.dims(), expected));
    }
    if args.values.format != args.keys.format {
        let reason = format!("are {}, the keys {}", args.values.format.name(), args.keys.format.name());
        return Err(OpError::value(operation, "values", reason));
    }
    check::dims(operation, "out", args.out, &[batch, queries, q_heads, args.values.width])?;
    check::float(operation, "q", args.q)?;
    check::float(operation, "out", args.out)?;
    check::finite(operation, "scale", args.scale)?;
    if let Some(softcap) = args.softcap {
        check::positive(operation, "softcap", softcap)?;
    }
    if args.window == Window::Left(0) {
        return Err(OpError::value(operation, "window", "is 0: no key would be visible"));
    }
    if let Some(sinks) = args.sinks {
        check::dims(operation, "sinks", sinks, &[q_heads])?;
        check::float(operation, "sinks", sinks)?;
    }
    check::dtype(operation, "block_table", args.block_table, DType::U32)?;
    let most = match *args.block_table.dims() {
        [b, most] if b == batch => most,
        _ => {
            let expected = format!("[{batch}, most blocks]");
            return Err(OpError::shape(operation, "block_table", args.block_table.dims(), expected));
        }
    };
    check_lengths(operation, args, batch, queries, most * block_size)
}

/// As many as sequences; each at most what the table holds, and at least one, or as many as queries with positions. 0
/// where rows may be empty.
fn check_lengths<D: Device>(
    operation: &'static str,
    args: &PagedAttentionArgs<'_, D>,
    batch: usize,
    queries: usize,
    most: usize,
) -> Result<()> {
    if args.kv_len.len() != batch {
        return Err(OpError::shape(operation, "kv_len", &[args.kv_len.len()], format!("[{batch}]")));
    }
    let positioned = args.causal || args.window != Window::None;
    let least = if positioned { queries.max(1) } else { 1 };
    for (b, &len) in args.kv_len.iter().enumerate() {
        let empty = len == 0 && args.empty_row == EmptyRow::Zero;
        if !empty && (len < least || len > most) {
            let reason = format!("[{b}] is {len}, must be in {least}..={most}");
            return Err(OpError::value(operation, "kv_len", reason));
        }
    }
    Ok(())
}
