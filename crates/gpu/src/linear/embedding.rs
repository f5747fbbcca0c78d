//! Rows of an embedding: one unit decodes one unit of a token's weights.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::operands::{Grouping, group_of};
use crate::decode::{Decoder, decode_unit, group_scale, group_zero, weight_of};
use crate::element::{Storage, store};
use crate::fault::{self, Fault};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct EmbeddingConfig {
    pub(super) decoder: Decoder,
    pub(super) grouping: Grouping,
    pub(super) out: Storage,
}

/// `out[t, :] = W[ids[t], :]`; an id outside the vocabulary is a fault and writes nothing.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn embedding<S: Numeric, O: Numeric>(
    ids: &[u32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    tokens: u32,
    vocab: u32,
    hidden: u32,
    group: u32,
    #[comptime] c: EmbeddingConfig,
    #[define(S, O)] _elements: [ElemType; 2],
) {
    let (vocab, hidden) = (vocab as usize, hidden as usize);
    let codes = comptime!(c.decoder.unit());
    let units = hidden.div_ceil(codes);
    let token = ABSOLUTE_POS / units;
    if token < tokens as usize {
        let unit = ABSOLUTE_POS % units;
        let id = ids[token] as usize;
        if id >= vocab {
            fault::record(faults, Fault::EmbeddingId, token);
        } else {
            let levels = decode_unit(words, table, 0usize.runtime(), unit, id, vocab, c.decoder);
            let at_group = group_of(unit, group, c.grouping) * vocab + id;
            let scale = group_scale::<S>(scales, table, at_group, c.decoder);
            let zero = group_zero::<S>(zeros, at_group, c.decoder);
            #[unroll]
            for i in 0..codes {
                let feature = unit * codes + i;
                if feature < hidden {
                    store::<O>(out, token * hidden + feature, weight_of(levels[i], scale, zero, c.decoder), c.out);
                }
            }
        }
    }
}
