//! Attention over blocks, in every cache format.

use half::f16;
use marlin_formats::DType;
use marlin_ops::attention::{EmptyRow, KvFormat, KvPages, PADDING, PagedAttentionArgs, PagedWriteArgs, Window};
use marlin_ops::{Backend, HostTensor, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, ids, poison};
use crate::random::Random;
use crate::tolerance::{self, Tolerance};

/// What stands in a table behind the last block.
const GARBAGE: u32 = 0xDEAD_BEEF;

#[derive(Clone)]
struct PagedCase {
    queries: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    block_size: usize,
    /// One entry per sequence.
    kv_len: Vec<usize>,
    format: KvFormat,
    causal: bool,
    window: Window,
    softcap: Option<f32>,
    sinks: bool,
    empty_row: EmptyRow,
    /// The first block of all sequences is the same one.
    shared: bool,
    /// Changes that a bad case makes to a used table entry, to the table's width and to the format of the values.
    bad_block: Option<u32>,
    table_width: Option<usize>,
    value_format: Option<KvFormat>,
}

/// GQA 2 over blocks of 16.
fn base(queries: usize, kv_len: &[usize]) -> PagedCase {
    PagedCase {
        queries,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        value_dim: 64,
        block_size: 16,
        kv_len: kv_len.to_vec(),
        format: KvFormat::F32,
        causal: true,
        window: Window::None,
        softcap: None,
        sinks: false,
        empty_row: EmptyRow::Error,
        shared: false,
        bad_block: None,
        table_width: None,
        value_format: None,
    }
}

/// Blocks of the sequences, in no order, and which of their rows hold keys.
struct Blocks {
    /// `[B, width]`.
    table: Vec<u32>,
    width: usize,
    count: usize,
    /// `[count]` rows from 0 on.
    rows: Vec<usize>,
}

impl PagedCase {
    fn blocks(&self, random: &mut Random) -> Blocks {
        let needed: Vec<usize> = self.kv_len.iter().map(|len| len.div_ceil(self.block_size)).collect();
        let count = needed.iter().sum::<usize>() + 2;
        let mut free = random.distinct(count, count);
        let width = needed.iter().copied().max().unwrap_or(0) + 1;
        let (mut table, mut rows) = (Vec::new(), vec![0; count]);
        // The last to be handed out, which never happens: there are two more than needed.
        let first = free[0];
        for (&len, &needed) in self.kv_len.iter().zip(&needed) {
            for entry in 0..width {
                let id = match entry {
                    _ if entry >= needed => GARBAGE,
                    0 if self.shared => first,
                    _ => free.pop().unwrap_or(GARBAGE),
                };
                if entry < needed {
                    let used = (len - entry * self.block_size).min(self.block_size);
                    rows[id as usize] = used.max(rows[id as usize]);
                }
                table.push(id);
            }
        }
        if let Some(bad) = self.bad_block {
            table[needed[0] - 1] = bad.min(count as u32);
        }
        Blocks { table, width, count, rows }
    }

    /// Rows of keys or values; NaN, or codes and scales that decode to NaN, where there is no key.
    fn pages<B: Backend>(
        &self,
        b: &B,
        format: KvFormat,
        width: usize,
        blocks: &Blocks,
        random: &mut Random,
    ) -> Result<KvPages<B>> {
        let shape = [blocks.count, self.kv_heads, self.block_size];
        let rows: usize = shape.iter().product();
        let used = |row: usize| row % self.block_size < blocks.rows[row / self.block_size / self.kv_heads];
        let values = random.normals(rows * width);
        let dims = [shape[0], shape[1], shape[2], format.row_elements(width)];
        if !format.is_quantized() {
            let value = |(i, x): (usize, f32)| if used(i / width) { x } else { f32::NAN };
            let values: Vec<f32> = values.into_iter().enumerate().map(value).collect();
            return KvPages::from_tensors(format, width, floats_as(b, format.dtype(), &dims, &values)?, None);
        }
        let (mut words, mut scales) = (Vec::new(), Vec::new());
        for (row, values) in values.chunks(width).enumerate() {
            let stored = format.quantize(values).filter(|_| used(row));
            let (scale, codes) = stored.unwrap_or_else(|| (f16::NAN, vec![u32::MAX; format.row_elements(width)]));
            words.extend(codes);
            scales.push(scale.to_f32());
        }
        let scales = floats_as(b, DType::F16, &shape, &scales)?;
        KvPages::from_tensors(format, width, b.upload(&HostTensor::from_u32(&dims, &words)?)?, Some(scales))
    }
}

impl Case for PagedCase {
    const OPERATION: &'static str = "paged_attention";

    fn configuration(&self) -> String {
        let PagedCase { queries, q_heads, kv_heads, head_dim, value_dim, block_size, .. } = self;
        let (len, format) = (&self.kv_len, self.format.name());
        let mut text = format!(
            "Sq={queries} Sk={len:?} bs={block_size} Hq/Hkv={q_heads}/{kv_heads} D={head_dim} Dv={value_dim} kv={format}"
        );
        if !self.causal {
            text += " not causal";
        }
        if self.window != Window::None {
            text += &format!(" {:?}", self.window);
        }
        if let Some(softcap) = self.softcap {
            text += &format!(" softcap={softcap}");
        }
        if self.sinks {
            text += " sinks";
        }
        if self.empty_row != EmptyRow::Error {
            text += " empty_row=zero";
        }
        if self.shared {
            text += " shared block";
        }
        text
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let batch = self.kv_len.len();
        let q_dims = [batch, self.queries, self.q_heads, self.head_dim];
        let q = floats(b, &q_dims, &random.normals(q_dims.iter().product()))?;
        let blocks = self.blocks(random);
        let keys = self.pages(b, self.format, self.head_dim, &blocks, random)?;
        let values = self.pages(b, self.value_format.unwrap_or(self.format), self.value_dim, &blocks, random)?;
        let width = self.table_width.unwrap_or(blocks.width);
        let table: Vec<u32> = blocks.table.chunks(blocks.width).flat_map(|row| row[..width].to_vec()).collect();
        let block_table = ids(b, &[batch, width], &table)?;
        let sinks = floats(b, &[self.q_heads], &random.normals(self.q_heads))?;
        let mut out = poison(b, &[batch, self.queries, self.q_heads, self.value_dim])?;
        b.paged_attention(PagedAttentionArgs {
            q: &q,
            keys: &keys,
            values: &values,
            block_table: &block_table,
            kv_len: &self.kv_len,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            sinks: self.sinks.then_some(&sinks),
            empty_row: self.empty_row,
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, mode: Mode) -> Vec<Tolerance> {
        // Codes and values of 16 bits are operands as they are.
        let cache = if self.format == KvFormat::F32 { DType::F32 } else { DType::F16 };
        vec![Tolerance::Blocks { block: self.value_dim, bound: tolerance::attention(mode, cache) }]
    }
}

struct PagedWriteCase {
    slots: Vec<u32>,
    head_dim: usize,
    value_dim: usize,
    format: KvFormat,
    /// A value of K that a bad case writes.
    bad: Option<f32>,
    /// Blocks of the values, 3 in a good case.
    value_blocks: usize,
}

/// Heads and rows of the blocks that are written.
const WRITE_HEADS: usize = 2;
const WRITE_BLOCK: usize = 4;

fn write(slots: &[u32], format: KvFormat) -> PagedWriteCase {
    PagedWriteCase { slots: slots.to_vec(), head_dim: 16, value_dim: 8, format, bad: None, value_blocks: 3 }
}

/// Rows of all kinds: usual, zeros, one large value, tiny.
fn rows(count: usize, width: usize, random: &mut Random) -> Vec<f32> {
    let mut values = random.normals(count * width);
    for (i, row) in values.chunks_mut(width).enumerate() {
        match i % 5 {
            1 => row.fill(0.0),
            2 => row[i % width] = 300.0,
            3 => row.iter_mut().for_each(|x| *x *= 1e-6),
            _ => {}
        }
    }
    values
}

/// Every row, decoded.
fn read_pages<B: Backend>(b: &B, name: &'static str, pages: &KvPages<B>) -> Result<Output> {
    let (format, width) = (pages.format(), pages.width());
    let Some(scales) = pages.scales() else { return Output::floats(b, name, pages.data()) };
    let (words, scales) = (b.read_u32(pages.data())?, b.read_f64(scales)?);
    let row = |(codes, scale): (&[u32], &f64)| -> Vec<f64> {
        (0..width).map(|i| f64::from(format.decode(format.code(codes, i))) * scale).collect()
    };
    let values = words.chunks(format.row_elements(width)).zip(&scales).flat_map(row).collect();
    Ok(Output { name, values })
}

impl Case for PagedWriteCase {
    const OPERATION: &'static str = "paged_write";

    fn configuration(&self) -> String {
        let PagedWriteCase { slots, head_dim, value_dim, .. } = self;
        format!("slots={slots:?} D={head_dim} Dv={value_dim} kv={}", self.format.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let tokens = self.slots.len();
        let mut k = rows(tokens * WRITE_HEADS, self.head_dim, random);
        if let Some(bad) = self.bad {
            let last = k.len() - 1;
            k[last] = bad;
        }
        let k = floats(b, &[tokens, WRITE_HEADS, self.head_dim], &k)?;
        let v = rows(tokens * WRITE_HEADS, self.value_dim, random);
        let v = floats(b, &[tokens, WRITE_HEADS, self.value_dim], &v)?;
        let mut keys = KvPages::new(b, self.format, [3, WRITE_HEADS, WRITE_BLOCK], self.head_dim)?;
        let mut values = KvPages::new(b, self.format, [self.value_blocks, WRITE_HEADS, WRITE_BLOCK], self.value_dim)?;
        b.paged_write(PagedWriteArgs { k: &k, v: &v, slots: &self.slots, keys: &mut keys, values: &mut values })?;
        Ok(vec![read_pages(b, "keys", &keys)?, read_pages(b, "values", &values)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact; 2]
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for format in KvFormat::ALL {
        for (queries, kv_len) in
            [(1, &[1][..]), (1, &[15, 16, 17]), (1, &[255, 1, 257]), (2, &[2, 40]), (5, &[5, 300]), (33, &[33, 70])]
        {
            runner.check(&PagedCase { format, ..base(queries, kv_len) });
        }
        for (head_dim, value_dim) in [(80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (20, 12)] {
            runner.check(&PagedCase { head_dim, value_dim, format, ..base(1, &[50]) });
        }
        runner.check(&PagedCase { format, q_heads: 8, kv_heads: 1, ..base(2, &[40]) });
        runner.check(&PagedCase { format, causal: false, ..base(7, &[64]) });
        for slots in [&[0][..], &[11, 2, 5, 0], &[3, PADDING, 4, 9, PADDING, 1], &[PADDING]] {
            runner.check(&write(slots, format));
        }
        runner.check(&PagedWriteCase { head_dim: 65, value_dim: 33, ..write(&[4, 1, 9], format) });
        runner.check(&PagedWriteCase { head_dim: 128, value_dim: 256, ..write(&[0, 1, 2, 3, 4, 5], format) });
        runner.check(&write(&[], format));
    }
    options(runner);
    bad_arguments(runner);
}

fn options<B: Backend>(runner: &mut Runner<'_, B>) {
    runner.check(&base(1, &[4095]));
    runner.check(&base(0, &[5]));
    for format in [KvFormat::F32, KvFormat::F16] {
        for block_size in [1, 8, 24, 128] {
            runner.check(&PagedCase { block_size, format, ..base(3, &[130, 7]) });
        }
        options_of(runner, format);
    }
}

fn options_of<B: Backend>(runner: &mut Runner<'_, B>, format: KvFormat) {
    for (queries, kv_len) in [(1, &[130, 17][..]), (9, &[40, 33])] {
        let base = PagedCase { format, ..base(queries, kv_len) };
        for window in [Window::Left(1), Window::Left(20), Window::Symmetric { left: 3, right: 2 }] {
            runner.check(&PagedCase { window, causal: false, ..base.clone() });
        }
        runner.check(&PagedCase { shared: true, ..base.clone() });
        let format = if format == KvFormat::F32 { KvFormat::Int8 } else { format };
        runner.check(&PagedCase { softcap: Some(5.0), sinks: true, format, ..base.clone() });
        let zero = PagedCase { empty_row: EmptyRow::Zero, kv_len: vec![33, 0, 17], ..base };
        let format = if format == KvFormat::Int8 { KvFormat::Fp8 } else { format };
        runner.check(&PagedCase { format, ..zero.clone() });
        runner.check(&PagedCase { sinks: true, ..zero });
    }
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let base = base(2, &[40, 17]);
    for bad in [u32::MAX, 1000] {
        let case = PagedCase { bad_block: Some(bad), ..base.clone() };
        runner.refuse("no such block", &case, Refusal::Value("block_table"));
    }
    let case = PagedCase { queries: 1, kv_len: vec![5, 0], ..base.clone() };
    runner.refuse("kv_len 0", &case, Refusal::Value("kv_len"));
    let case = PagedCase { table_width: Some(2), ..base.clone() };
    runner.refuse("kv_len beyond the table", &case, Refusal::Value("kv_len"));
    let case = PagedCase { value_format: Some(KvFormat::F16), ..base.clone() };
    runner.refuse("two formats", &case, Refusal::Value("values"));
    runner.refuse("Hq % Hkv", &PagedCase { kv_heads: 3, ..base.clone() }, Refusal::Shape("keys"));
    runner.refuse("window 0", &PagedCase { window: Window::Left(0), ..base.clone() }, Refusal::Value("window"));
    runner.refuse("softcap 0", &PagedCase { softcap: Some(0.0), ..base }, Refusal::Value("softcap"));
    runner.refuse("no such slot", &write(&[0, 12], KvFormat::F32), Refusal::Value("slots"));
    runner.refuse("a slot twice", &write(&[3, 0, 3], KvFormat::Int4), Refusal::Value("slots"));
    let case = PagedWriteCase { value_blocks: 2, ..write(&[0], KvFormat::F16) };
    runner.refuse("blocks of another shape", &case, Refusal::Shape("values"));
    for format in [KvFormat::Fp8, KvFormat::Int8, KvFormat::Int4, KvFormat::Fp4] {
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let case = PagedWriteCase { bad: Some(bad), ..write(&[3, 0], format) };
            runner.refuse(&format!("{bad} in {}", format.name()), &case, Refusal::Value("k"));
        }
    }
}
