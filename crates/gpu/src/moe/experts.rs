//! The routed experts of a layer in device memory.

use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::*;
use marlin_ops::{ExpertWeights, Result, Weight};

use crate::decode::{Decoder, Levels, Scale};
use crate::weight::{GpuWeight, Packed, pack};
use crate::{Buffer, Gpu};

/// The routed experts of a layer on a GPU. Weights of one projection that are decoded alike lie in one buffer, so that
/// one launch serves all their experts.
pub struct GpuExperts {
    pub(crate) count: usize,
    pub(super) banks: Vec<Bank>,
    pub(super) groups: Vec<Group>,
    /// `[experts, hidden]` U32: the channel that row k of an expert's gate and up multiplies, where any expert has an order
    /// of its own.
    pub(super) input_orders: Option<Buffer>,
}

/// Weights of one projection with the same decoder.
pub(super) struct Bank {
    /// All of them, one behind the other, with the sizes of one: words `[experts, word rows, N]`, scales and zero points or
    /// offsets `[experts, G, N]`, a table `[experts, 256]` where tensors have their own scale, bias `[experts, N]`.
    pub(super) weight: GpuWeight,
    /// The bias where it is added after a rotation, and its length.
    pub(super) late_bias: Option<(Buffer, usize)>,
}

/// A bank as kernel arguments.
pub(super) struct Operands<R: Runtime> {
    pub(super) words: BufferArg<R>,
    pub(super) scales: BufferArg<R>,
    pub(super) zeros: BufferArg<R>,
    pub(super) table: BufferArg<R>,
    pub(super) bias: BufferArg<R>,
    pub(super) scale_elem: ElemType,
}

impl<R: Runtime> Operands<R> {
    /// The arguments in the place of a bank that a kernel does not read.
    pub(super) fn unread(gpu: &Gpu<R>) -> Self {
        Self {
            words: gpu.unread(),
            scales: gpu.unread(),
            zeros: gpu.unread(),
            table: gpu.unread(),
            bias: gpu.unread(),
            scale_elem: ElemType::UInt(UIntKind::U32),
        }
    }
}

impl Bank {
    pub(super) fn operands<R: Runtime>(&self, gpu: &Gpu<R>) -> Operands<R> {
        let weight = &self.weight;
        Operands {
            words: weight.words_arg(1),
            scales: weight.scales_arg(1),
            zeros: weight.zeros_arg(1),
            table: weight.table_arg(),
            bias: weight.bias_arg(gpu),
            scale_elem: weight.decoder.scale_elem(),
        }
    }
}

/// The experts that have their projections in the same banks.
pub(super) struct Group {
    /// Of gate, up and down.
    pub(super) banks: [usize; 3],
    /// `[3, E]`: an expert's place in each bank, [`u32::MAX`] for the experts of other groups.
    pub(super) places: Buffer,
}

/// A bank that is being filled.
struct Filling {
    projection: usize,
    decoder: Decoder,
    in_features: usize,
    out_features: usize,
    experts: Vec<(Packed, Option<Vec<f32>>)>,
    bytes: u64,
}

impl Filling {
    /// Whether the weight's codes stand for the same values as the bank's.
    fn shares_table(&self, packed: &Packed) -> bool {
        self.decoder.levels != Levels::Table
            || self.experts.first().is_none_or(|(first, _)| first.table == packed.table)
    }

    /// Uploads the weights.
    fn finish<R: Runtime>(self, gpu: &Gpu<R>) -> Result<Bank> {
        const OP: &str = "prepare_experts";
        let (mut words, mut scales, mut zeros, mut table) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut scale_count, mut zero_count, mut bias) = (0, 0, Vec::new());
        let biased = self.experts.iter().any(|(_, bias)| bias.is_some());
        for (packed, expert_bias) in self.experts {
            words.extend(packed.words);
            scales.extend(packed.scales);
            scale_count += packed.scale_count;
            zeros.extend(packed.zeros);
            zero_count += packed.zero_count;
            if table.is_empty() || self.decoder.scale == Scale::Byte {
                table.extend(packed.table);
            }
            if biased {
                bias.extend(expert_bias.unwrap_or_else(|| vec![0.0; self.out_features]));
            }
        }
        let bias = if biased { Some((gpu.create_f32(OP, &bias)?, bias.len())) } else { None };
        let (bias, late_bias) = if self.decoder.is_trellis() { (None, bias) } else { (bias, None) };
        let weight = GpuWeight {
            in_features: self.in_features,
            out_features: self.out_features,
            decoder: self.decoder,
            word_count: words.len().max(1),
            words: gpu.create_u32(OP, &words)?,
            scale_count: scale_count.max(1),
            scales: gpu.create(OP, &scales)?,
            zero_count: zero_count.max(1),
            zeros: gpu.create(OP, &zeros)?,
            table_len: table.len().max(1),
            table: gpu.create_f32(OP, &table)?,
            bias: bias.map(|(bias, _)| bias),
            input_order: None,
        };
        Ok(Bank { weight, late_bias })
    }
}

/// Puts a weight into the bank of its kind: `(bank, place)`. A bank that would outgrow a buffer is followed by another.
fn place(banks: &mut Vec<Filling>, projection: usize, weight: &Weight, most: u64) -> Result<(usize, u32)> {
    let packed = pack(weight)?;
    let bytes = (packed.words.len() * 4) as u64;
    let fits = |bank: &Filling| {
        bank.projection == projection
            && bank.decoder == packed.decoder
            && bank.bytes + bytes <= most
            && bank.shares_table(&packed)
    };
    let index = banks.iter().position(fits).unwrap_or_else(|| {
        let (decoder, in_features, out_features) = (packed.decoder, weight.in_features(), weight.out_features());
        banks.push(Filling { projection, decoder, in_features, out_features, experts: Vec::new(), bytes: 0 });
        banks.len() - 1
    });
    let bank = &mut banks[index];
    bank.bytes += bytes;
    bank.experts.push((packed, weight.bias.clone()));
    Ok((index, bank.experts.len() as u32 - 1))
}

impl GpuExperts {
    /// Uploads the experts of a layer.
    pub(crate) fn new<R: Runtime>(gpu: &Gpu<R>, experts: &[ExpertWeights]) -> Result<Self> {
        const OP: &str = "prepare_experts";
        let most = gpu.properties().memory.max_page_size;
        let mut banks = Vec::new();
        let mut groups: Vec<([usize; 3], Vec<u32>)> = Vec::new();
        for (e, expert) in experts.iter().enumerate() {
            let (mut indices, mut places) = ([0; 3], [0; 3]);
            for (projection, weight) in [&expert.gate, &expert.up, &expert.down].into_iter().enumerate() {
                (indices[projection], places[projection]) = place(&mut banks, projection, weight, most)?;
            }
            let group = groups.iter().position(|(banks, _)| *banks == indices).unwrap_or_else(|| {
                groups.push((indices, vec![u32::MAX; 3 * experts.len()]));
                groups.len() - 1
            });
            for (projection, place) in places.into_iter().enumerate() {
                groups[group].1[projection * experts.len() + e] = place;
            }
        }
        let groups =
            groups.into_iter().map(|(banks, places)| Ok(Group { banks, places: gpu.create_u32(OP, &places)? }));
        Ok(Self {
            count: experts.len(),
            groups: groups.collect::<Result<_>>()?,
            banks: banks.into_iter().map(|bank| bank.finish(gpu)).collect::<Result<_>>()?,
            input_orders: input_orders(experts).map(|orders| gpu.create_u32(OP, &orders)).transpose()?,
        })
    }
}

/// The channels that gate and up read, expert by expert; none where all read them one after the other.
fn input_orders(experts: &[ExpertWeights]) -> Option<Vec<u32>> {
    if experts.iter().all(|expert| expert.gate.input_order.is_none()) {
        return None;
    }
    let channels = |expert: &ExpertWeights| match &expert.gate.input_order {
        Some(order) => order.channels().to_vec(),
        None => (0..expert.gate.in_features() as u32).collect(),
    };
    Some(experts.iter().flat_map(channels).collect())
}
