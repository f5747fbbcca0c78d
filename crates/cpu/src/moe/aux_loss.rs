//! The load-balancing loss, summed in f64 in the order of the tokens.

use marlin_ops::Result;
use marlin_ops::moe::{AuxLossArgs, aux_id_error, aux_logit_error, no_token_error};

use super::softmax;
use crate::Cpu;
use crate::buffer::{f32s, f32s_mut, u32s, u32s_mut};

/// Body of [`marlin_ops::MoeOps::moe_aux_loss`].
pub(super) fn moe_aux_loss(cpu: &Cpu, args: AuxLossArgs<'_, Cpu>) -> Result<()> {
    const OP: &str = "moe_aux_loss";
    let (experts, slots) = (args.logits.columns(), args.ids.columns());
    let logits = f32s(OP, "logits", args.logits)?;
    let ids = u32s(OP, "ids", args.ids)?;
    let mask = args.mask.map(|mask| u32s(OP, "mask", mask)).transpose()?;
    let counts = u32s_mut(OP, "counts", args.counts)?;
    counts.fill(0);
    let mut work = cpu.workspace.doubles.take(2 * experts);
    let (load, scores) = work.split_at_mut(experts);
    load.fill(0.0);
    let mut tokens = 0.0;
    for (t, logits) in logits.chunks_exact(experts).enumerate() {
        if mask.is_some_and(|mask| mask[t] == 0) {
            continue;
        }
        tokens += 1.0;
        let bad = logits.iter().any(|z| z.is_nan() || *z == f32::INFINITY);
        if bad || logits.iter().all(|z| *z == f32::NEG_INFINITY) {
            return Err(aux_logit_error(t));
        }
        scores.iter_mut().zip(logits).for_each(|(score, &z)| *score = f64::from(z));
        softmax(scores);
        load.iter_mut().zip(&*scores).for_each(|(load, p)| *load += p);
        for (a, &id) in ids.iter().enumerate().skip(t * slots).take(slots) {
            *counts.get_mut(id as usize).ok_or_else(|| aux_id_error(a))? += 1;
        }
    }
    if tokens == 0.0 {
        return Err(no_token_error());
    }
    let terms = load.iter().zip(&*counts).map(|(load, &count)| load / tokens * f64::from(count) / tokens);
    f32s_mut(OP, "loss", args.loss)?[0] = (experts as f64 * terms.sum::<f64>()) as f32;
    for (out, load) in f32s_mut(OP, "load", args.load)?.iter_mut().zip(load) {
        *out = *load as f32;
    }
    Ok(())
}
