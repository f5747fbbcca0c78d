//! The load-balancing loss.

use super::super::{Oracle, floats, store, store_words, words};
use super::softmax;
use crate::Result;
use crate::moe::{AuxLossArgs, aux_id_error, aux_logit_error, no_token_error};

/// Body of [`MoeOps::moe_aux_loss`](crate::MoeOps::moe_aux_loss).
pub(super) fn moe_aux_loss(args: AuxLossArgs<'_, Oracle>) -> Result<()> {
    let (experts, slots) = (args.logits.columns(), args.ids.columns());
    let (mut load, mut counts) = (vec![0.0; experts], vec![0u32; experts]);
    let mut tokens = 0.0;
    for (t, logits) in floats(args.logits).chunks(experts).enumerate() {
        if args.mask.is_some_and(|mask| words(mask)[t] == 0) {
            continue;
        }
        tokens += 1.0;
        let bad = logits.iter().any(|z| z.is_nan() || *z == f64::INFINITY);
        if bad || logits.iter().all(|z| *z == f64::NEG_INFINITY) {
            return Err(aux_logit_error(t));
        }
        for (load, p) in load.iter_mut().zip(softmax(logits)) {
            *load += p;
        }
        for a in t * slots..(t + 1) * slots {
            let count = counts.get_mut(words(args.ids)[a] as usize).ok_or_else(|| aux_id_error(a))?;
            *count += 1;
        }
    }
    if tokens == 0.0 {
        return Err(no_token_error());
    }
    let loss: f64 = load.iter().zip(&counts).map(|(load, &count)| load / tokens * f64::from(count) / tokens).sum();
    store(args.load, 0, &load);
    store_words(args.counts, &counts);
    store(args.loss, 0, &[loss * experts as f64]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{assert_close, empty, ids, tensor};
    use super::*;
    use crate::{Device, MoeOps, Tensor};

    fn loss(logits: &[f32], chosen: &[u32], slots: usize, mask: Option<&Tensor<Oracle>>) -> Result<f64> {
        let oracle = Oracle::new();
        let tokens = chosen.len() / slots;
        let experts = logits.len() / tokens;
        let (mut load, mut counts, mut loss) = (empty(&[experts]), ids(&[experts], &vec![9; experts]), empty(&[1]));
        oracle.moe_aux_loss(AuxLossArgs {
            logits: &tensor(&[tokens, experts], logits),
            ids: &ids(&[tokens, slots], chosen),
            mask,
            load: &mut load,
            counts: &mut counts,
            loss: &mut loss,
        })?;
        Ok(oracle.read_f64(&loss)?[0])
    }

    #[test]
    fn balance_gives_k_and_one_expert_for_all_gives_e() {
        let balanced = loss(&[0.0; 16], &[0, 1, 2, 3, 1, 2, 3, 0], 2, None).unwrap();
        assert_close(&[balanced], &[2.0], 1e-15);
        let mut logits = [-1000.0; 16];
        logits.iter_mut().step_by(4).for_each(|z| *z = 0.0);
        assert_close(&[loss(&logits, &[0; 4], 1, None).unwrap()], &[4.0], 1e-15);
    }

    #[test]
    fn padding_does_not_count() {
        let mask = ids(&[2], &[0, 1]);
        let nan = [f32::NAN, 0.0, 0.0, 0.0];
        assert_close(&[loss(&nan, &[7, 1], 1, Some(&mask)).unwrap()], &[1.0], 1e-15);
        assert!(loss(&nan, &[0, 1], 1, None).is_err());
        assert!(loss(&[0.0; 4], &[0, 2], 1, None).is_err());
        assert!(loss(&[0.0; 4], &[0, 1], 1, Some(&ids(&[2], &[0, 0]))).is_err());
    }
}
