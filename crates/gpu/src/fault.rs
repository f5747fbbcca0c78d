//! Bad values inside operands, found by kernels: an id outside a table, a query without a key, a NaN logit.
//!
//! A kernel records the smallest offending index in the slot of its fault; the next read of any tensor returns the
//! error and clears the record.

use cubecl::prelude::*;
use marlin_ops::OpError;

/// What can go wrong, in the order of the slots.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `embedding`: index of the id.
    EmbeddingId,
    /// `attention`: index of the query.
    EmptyRow,
    /// `argmax`: index of the logit.
    ArgmaxLogit,
    /// `logits_process`: index of the logit.
    ProcessLogit,
    /// `sample`: index of the logit.
    SampleLogit,
    /// `argmax`: row.
    ArgmaxEmpty,
    /// `sample`: row.
    SampleEmpty,
    /// `moe_route`: index of the logit.
    RouterLogit,
    /// Mixture operations: index of the assignment.
    ExpertId,
    /// `rope`: index of the position.
    RopePosition,
    /// `logits_process`: row.
    ProcessEmpty,
    /// Mixture operations: index of the assignment whose expert the token has already.
    ExpertTwice,
    /// `moe_combine`: index of the assignment.
    InverseIndex,
    /// `moe_route`: token.
    RouterEmpty,
    /// `paged_attention`: index of the entry of the block table.
    BlockId,
    /// `paged_write`: row of the keys.
    KeyRow,
    /// `paged_write`: row of the values.
    ValueRow,
    /// `softmax`: index of the logit.
    SoftmaxLogit,
    /// `softmax`: row.
    SoftmaxEmpty,
    /// `attention_split_reduce`: row.
    SplitEmpty,
    /// `moe_aux_loss`: token.
    AuxLogit,
    /// `moe_aux_loss`: index of the assignment.
    AuxId,
    /// `moe_aux_loss`: 0.
    AuxMask,
    /// `moe_grouped_gemm`: index of the offset.
    Offsets,
    /// `moe_grouped_gemm`: row.
    Permutation,
    /// `sample_categorical`: index of the probability.
    Probability,
    /// `sample_categorical`: row.
    NoProbability,
    /// `sample_gumbel`: index of the logit.
    GumbelLogit,
    /// `sample_gumbel`: row.
    GumbelEmpty,
}

/// Slots of a record.
pub(crate) const SLOTS: usize = 32;

/// An empty record.
pub(crate) const CLEAR: [u32; SLOTS] = [u32::MAX; SLOTS];

const ALL: [Fault; 29] = [
    Fault::EmbeddingId,
    Fault::EmptyRow,
    Fault::ArgmaxLogit,
    Fault::ProcessLogit,
    Fault::SampleLogit,
    Fault::ArgmaxEmpty,
    Fault::SampleEmpty,
    Fault::RouterLogit,
    Fault::ExpertId,
    Fault::RopePosition,
    Fault::ProcessEmpty,
    Fault::ExpertTwice,
    Fault::InverseIndex,
    Fault::RouterEmpty,
    Fault::BlockId,
    Fault::KeyRow,
    Fault::ValueRow,
    Fault::SoftmaxLogit,
    Fault::SoftmaxEmpty,
    Fault::SplitEmpty,
    Fault::AuxLogit,
    Fault::AuxId,
    Fault::AuxMask,
    Fault::Offsets,
    Fault::Permutation,
    Fault::Probability,
    Fault::NoProbability,
    Fault::GumbelLogit,
    Fault::GumbelEmpty,
];

/// Records `fault` at `index`.
#[cube]
pub(crate) fn record(faults: &mut [Atomic<u32>], #[comptime] fault: Fault, index: usize) {
    faults[comptime!(fault as usize)].fetch_min(index as u32);
}

/// The error of a record, if it holds one.
pub(crate) fn error(record: &[u32]) -> Option<OpError> {
    let (fault, index) = ALL.into_iter().zip(record).find(|(_, index)| **index != u32::MAX)?;
    Some(match fault {
        Fault::EmbeddingId => OpError::value("embedding", "ids", format!("[{index}] is outside the vocabulary")),
        Fault::EmptyRow => OpError::value("attention", "q", format!("query {index} sees no key")),
        Fault::ArgmaxLogit => logit("argmax", *index),
        Fault::ProcessLogit => logit("logits_process", *index),
        Fault::SampleLogit => logit("sample", *index),
        Fault::ArgmaxEmpty => marlin_ops::sampling::empty_logits_error("argmax", *index as usize),
        Fault::SampleEmpty => marlin_ops::sampling::empty_logits_error("sample", *index as usize),
        Fault::RouterLogit => OpError::value("moe_route", "logits", format!("element {index} is NaN or +inf")),
        Fault::ExpertId => OpError::value("moe", "ids", format!("[{index}] is no expert of this layer")),
        Fault::RopePosition => OpError::value("rope", "positions", format!("[{index}] is outside the tables")),
        Fault::ProcessEmpty => marlin_ops::sampling::empty_logits_error("logits_process", *index as usize),
        Fault::ExpertTwice => OpError::value("moe", "ids", format!("[{index}] names an expert of its token again")),
        Fault::InverseIndex => OpError::value("moe_combine", "inverse", format!("[{index}] is no row")),
        Fault::RouterEmpty => marlin_ops::moe::no_expert_error(*index as usize),
        Fault::BlockId => marlin_ops::attention::block_error(*index as usize),
        Fault::KeyRow => marlin_ops::attention::unstorable_error("k", *index as usize),
        Fault::ValueRow => marlin_ops::attention::unstorable_error("v", *index as usize),
        Fault::SoftmaxLogit => logit("softmax", *index),
        Fault::SoftmaxEmpty => marlin_ops::sampling::empty_logits_error("softmax", *index as usize),
        Fault::SplitEmpty => {
            let reason = format!("of row {index} are -inf in every partition: no key");
            OpError::value("attention_split_reduce", "max", reason)
        }
        Fault::AuxLogit => marlin_ops::moe::aux_logit_error(*index as usize),
        Fault::AuxId => marlin_ops::moe::aux_id_error(*index as usize),
        Fault::AuxMask => marlin_ops::moe::no_token_error(),
        Fault::Offsets => marlin_ops::moe::offsets_error(*index as usize),
        Fault::Permutation => marlin_ops::moe::permutation_error(*index as usize),
        Fault::Probability => {
            let reason = format!("element {index} is negative or not finite");
            OpError::value("sample_categorical", "probabilities", reason)
        }
        Fault::NoProbability => marlin_ops::sampling::no_probability_error(*index as usize),
        Fault::GumbelLogit => logit("sample_gumbel", *index),
        Fault::GumbelEmpty => marlin_ops::sampling::empty_logits_error("sample_gumbel", *index as usize),
    })
}

fn logit(operation: &'static str, index: u32) -> OpError {
    OpError::value(operation, "logits", format!("element {index} is NaN or +inf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_in_order() {
        for (slot, fault) in ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, slot);
            let mut record = CLEAR;
            assert!(error(&record).is_none());
            record[slot] = 7;
            let message = error(&record).unwrap().to_string();
            assert!(message.contains('7') || fault == Fault::AuxMask, "{message}");
        }
    }
}
