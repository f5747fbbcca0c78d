//! Mixture of experts: routing, stable grouping, the experts' gated MLPs and their weighted sum.
//!
//! Few tokens: one task per (token, slot) and stretch of columns, so that decoding reads only the chosen experts. Many
//! tokens: assignments sorted by expert, one task per expert and block of rows. Both give the same bits.

mod aux_loss;
mod grouped;

use std::ops::Range;

use marlin_ops::linear::Activation;
use marlin_ops::moe::{
    AuxLossArgs, CombineArgs, ExpertMlpArgs, GroupArgs, GroupScore, GroupedGemmArgs, RouteArgs, Routing, Scoring,
    duplicate_expert_error, expert_id_error, inverse_index_error, nan_logit_error, no_expert_error,
};
use marlin_ops::{MoeOps, Result};

use crate::Cpu;
use crate::buffer::{f32s, f32s_mut, optional_f32s, u32s, u32s_mut};
use crate::layout::exl3::SPAN;
use crate::layout::{PackedExpert, PackedExperts};
use crate::linear::{Activations, Addend, Gated};
use crate::simd::{Kernel, LANES, Line, Simd};
use crate::workspace::Scratch;

/// Largest number of tokens that is not sorted by expert.
const DECODE_TOKENS: usize = 4;
/// Rows of one task of a sorted batch.
const ROW_BLOCK: usize = 64;

/// Router scores of one token, with the selection scores behind them.
struct Scores<'a> {
    scores: &'a mut [f64],
    selection: &'a mut [f64],
    group_scores: &'a mut [f64],
}

/// In-place softmax.
fn softmax(values: &mut [f64]) {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f64 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= sum);
}

/// The lowest index of the largest value among those that `allowed` admits.
fn largest(values: &[f64], allowed: impl Fn(usize) -> bool) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, v) in values.iter().enumerate() {
        if allowed(i) && best.is_none_or(|b| *v > values[b]) {
            best = Some(i);
        }
    }
    best
}

/// Score of one group of experts.
fn group_score(group: &[f64], rule: GroupScore) -> f64 {
    let (mut first, mut second) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    for &q in group {
        if q > first {
            (first, second) = (q, first);
        } else if q > second {
            second = q;
        }
    }
    match rule {
        GroupScore::TopTwoSum if group.len() > 1 => first + second,
        _ => first,
    }
}

/// Chooses the experts of one token; `work` has been sized for the layer. None if too few have a selection score above
/// -inf.
fn route_token(
    logits: &[f32],
    bias: Option<&[f32]>,
    routing: &Routing,
    work: &mut Scores<'_>,
    ids: &mut [u32],
    weights: &mut [f32],
) -> Option<()> {
    for (score, &z) in work.scores.iter_mut().zip(logits) {
        *score = match routing.scoring {
            Scoring::Sigmoid => 1.0 / (1.0 + (-f64::from(z)).exp()),
            Scoring::Softmax | Scoring::SoftmaxSelected => f64::from(z),
        };
    }
    if routing.scoring == Scoring::Softmax {
        softmax(work.scores);
    }
    for (e, q) in work.selection.iter_mut().enumerate() {
        *q = work.scores[e] + bias.map_or(0.0, |bias| f64::from(bias[e]));
    }
    let group_size = work.selection.len() / routing.n_group;
    let groups = work.selection.chunks_exact(group_size);
    for (score, group) in work.group_scores.iter_mut().zip(groups) {
        *score = group_score(group, routing.group_score);
    }
    let kept_groups = |g: usize| {
        let better = |(i, s): (usize, &f64)| *s > work.group_scores[g] || (*s == work.group_scores[g] && i < g);
        let ahead = work.group_scores.iter().enumerate().filter(|&x| better(x));
        ahead.count() < routing.topk_group
    };
    for s in 0..ids.len() {
        let taken = &ids[..s];
        let free = |e: usize| {
            work.selection[e] > f64::NEG_INFINITY && !taken.contains(&(e as u32)) && kept_groups(e / group_size)
        };
        ids[s] = largest(work.selection, free)? as u32;
    }
    store_weights(ids, routing, work, weights);
    Some(())
}

/// Weights of the chosen experts, from their scores alone.
fn store_weights(ids: &[u32], routing: &Routing, work: &mut Scores<'_>, weights: &mut [f32]) {
    // The selection scores are no longer needed.
    let chosen = &mut work.selection[..ids.len()];
    for (w, &e) in chosen.iter_mut().zip(ids) {
        *w = work.scores[e as usize];
    }
    if routing.scoring == Scoring::SoftmaxSelected {
        softmax(chosen);
    }
    let norm = match routing.norm_topk_prob {
        true => chosen.iter().sum::<f64>() + f64::from(routing.norm_eps),
        false => 1.0,
    };
    for (out, w) in weights.iter_mut().zip(chosen) {
        *out = (*w / norm * f64::from(routing.routed_scaling_factor)) as f32;
    }
}

/// Every id is an expert, none twice in one token.
fn check_ids(ids: &[u32], top_k: usize, experts: usize) -> Result<()> {
    for (t, token) in ids.chunks(top_k.max(1)).enumerate() {
        for (s, &id) in token.iter().enumerate() {
            if id as usize >= experts {
                return Err(expert_id_error(t, s, id, experts));
            }
            if token[..s].contains(&id) {
                return Err(duplicate_expert_error(t, id));
            }
        }
    }
    Ok(())
}

/// Stable counting sort of assignments by expert; `offsets` has one entry more than there are experts.
fn group(ids: &[u32], offsets: &mut [u32], permutation: &mut [u32], inverse: &mut [u32]) {
    offsets.fill(0);
    for &id in ids {
        offsets[id as usize + 1] += 1;
    }
    for e in 1..offsets.len() {
        offsets[e] += offsets[e - 1];
    }
    // Each offset serves as the expert's cursor, which ends at the next expert's offset.
    for (a, &id) in ids.iter().enumerate() {
        let row = offsets[id as usize];
        offsets[id as usize] += 1;
        permutation[row as usize] = a as u32;
        inverse[a] = row;
    }
    for e in (1..offsets.len()).rev() {
        offsets[e] = offsets[e - 1];
    }
    offsets[0] = 0;
}

/// `out = addend + sum_s weights[s] rows[s]` for one token, or some of its columns; ascending s.
struct Combine<'a, 'o, R> {
    addend: Addend<'a>,
    /// Of `out[0]` in the output.
    start: usize,
    weights: &'a [f32],
    /// The row of a slot, as long as `out`.
    row: R,
    out: &'o mut [f32],
}

impl<'r, R: Fn(usize) -> &'r [f32]> Kernel for Combine<'_, '_, R> {
    type Output = ();

    // Plain loops: the compiler makes vectors of them.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let out = self.out;
        match self.addend {
            Addend::None => out.fill(0.0),
            Addend::Add(residual) => out.copy_from_slice(&residual[self.start..self.start + out.len()]),
            Addend::InPlace => {}
        }
        for (s, w) in self.weights.iter().enumerate() {
            for (out, z) in out.iter_mut().zip((self.row)(s)) {
                *out += w * z;
            }
        }
    }
}

/// One call of the experts.
struct ExpertMlp<'a> {
    cpu: &'a Cpu,
    x: &'a [f32],
    ids: &'a [u32],
    weights: &'a [f32],
    experts: &'a PackedExperts,
    activation: Activation,
    hidden: usize,
    intermediate: usize,
    top_k: usize,
    addend: Addend<'a>,
}

impl<'a> ExpertMlp<'a> {
    fn expert(&self, assignment: usize) -> &'a PackedExpert {
        &self.experts.0[self.ids[assignment] as usize]
    }

    fn gated(&self, expert: &'a PackedExpert) -> Gated<'a> {
        Gated { gate: &expert.gate, up: &expert.up, activation: self.activation }
    }

    /// A row for each assignment that `assignment` lists, its token's with the channels as its expert reads them; none
    /// where the chosen experts read them one after the other.
    fn ordered_rows(&self, assignment: impl Fn(usize) -> usize + Sync + Send) -> Option<Scratch<'a, f32>> {
        if (0..self.ids.len()).all(|assignment| self.expert(assignment).gate.input_order.is_none()) {
            return None;
        }
        let mut rows = self.cpu.workspace.floats.take(self.ids.len() * self.hidden);
        self.cpu.for_rows(&mut rows, self.hidden, |row, out| {
            let assignment = assignment(row);
            let x = &self.x[assignment / self.top_k * self.hidden..][..self.hidden];
            match &self.expert(assignment).gate.input_order {
                Some(order) => order.gather(x, out),
                None => out.copy_from_slice(x),
            }
        });
        Some(rows)
    }

    /// Rows in every form that a chosen expert takes.
    fn activations<'x>(&self, x: &'x [f32], spread: bool) -> Activations<'x>
    where
        'a: 'x,
    {
        let mut out = self.cpu.activations(x, self.hidden, &[], false);
        for a in 0..self.ids.len() {
            let expert = self.expert(a);
            self.cpu.prepare_activations(&mut out, &[&expert.gate, &expert.up], spread);
        }
        out
    }

    /// Lines per slot, a multiple of the task length `grain`, and that, a multiple of the longest step of a chosen
    /// expert's weights.
    fn padded_tiles(&self, columns: usize, step: impl Fn(&PackedExpert) -> usize) -> (usize, usize) {
        let (slots, tiles) = (self.ids.len(), columns.div_ceil(LANES));
        let step = (0..slots).map(|slot| step(self.expert(slot))).max().unwrap_or(1);
        let grain = self.cpu.pool.grain(slots * tiles).min(tiles.max(1)).next_multiple_of(step);
        (tiles.next_multiple_of(grain), grain)
    }

    /// One task per slot and `grain` tiles.
    fn run_by_slot(&self, out: &mut [f32]) {
        let cpu = self.cpu;
        let slots = self.ids.len();
        let ordered = self.ordered_rows(|slot| slot);
        let x = self.activations(ordered.as_deref().unwrap_or(self.x), false);
        let (tiles, grain) = self.padded_tiles(self.intermediate, PackedExpert::hidden_step);
        let mut hidden = cpu.workspace.lines.take(slots * tiles);
        let work = slots * self.hidden * self.intermediate;
        cpu.pool.for_chunks_of(2 * work, &mut hidden, grain, |i, lines| {
            let (slot, first) = (i * grain / tiles, i * grain % tiles);
            let expert = self.expert(slot);
            let row = if ordered.is_some() { slot } else { slot / self.top_k };
            let mut panels = cpu.panels(self.hidden);
            let mut acc = [Line::default(); 2 * SPAN];
            let (gated, step, end) = (self.gated(expert), expert.hidden_step(), expert.gate.tiles());
            for (tile, lines) in (first..end).step_by(step).zip(lines.chunks_exact_mut(step)) {
                let (tiles, rows) = (tile..end.min(tile + step), row..row + 1);
                cpu.gated_tiles(&gated, tiles, [&x; 2], rows, &mut panels, &mut acc[..2 * step]);
                lines.copy_from_slice(&acc[..step]);
            }
        });
        let mut rows = cpu.workspace.floats.take(slots * self.intermediate);
        for (slot, row) in rows.chunks_exact_mut(self.intermediate.max(1)).enumerate() {
            let lines = &hidden[slot * tiles..(slot + 1) * tiles];
            for (out, line) in row.chunks_mut(LANES).zip(lines) {
                out.copy_from_slice(&line.0[..out.len()]);
            }
        }
        let mut h = cpu.activations(&rows, self.intermediate, &[], false);
        for slot in 0..slots {
            cpu.prepare_activations(&mut h, &[&self.expert(slot).down], false);
        }
        let (tiles, grain) = self.padded_tiles(self.hidden, |expert| expert.down.step());
        let mut partial = cpu.workspace.lines.take(slots * tiles);
        cpu.pool.for_chunks_of(work, &mut partial, grain, |i, lines| {
            let (slot, first) = (i * grain / tiles, i * grain % tiles);
            let down = &self.expert(slot).down;
            let mut panels = cpu.panels(self.intermediate);
            let (step, end) = (down.step(), down.tiles());
            for (tile, lines) in (first..end).step_by(step).zip(lines.chunks_exact_mut(step)) {
                let tiles = tile..end.min(tile + step);
                cpu.multiply_any(down, tiles.clone(), &h, slot..slot + 1, &mut panels, lines);
                for (tile, line) in tiles.zip(lines.chunks_exact_mut(1)) {
                    self.add_bias(down.bias_line(tile), line);
                }
            }
        });
        for (t, out) in out.chunks_exact_mut(self.hidden).enumerate() {
            let slots = t * self.top_k..(t + 1) * self.top_k;
            self.combine_lines(t, slots, &partial, tiles, out);
        }
    }

    fn add_bias(&self, bias: [f32; LANES], lines: &mut [Line<f32>]) {
        for line in lines {
            for (v, b) in line.0.iter_mut().zip(bias) {
                *v += b;
            }
        }
    }

    /// [`Combine`] of slots stored as lines.
    fn combine_lines(&self, t: usize, slots: Range<usize>, partial: &[Line<f32>], tiles: usize, out: &mut [f32]) {
        let weights = &self.weights[slots.clone()];
        for (tile, out) in out.chunks_mut(LANES).enumerate() {
            let start = t * self.hidden + tile * LANES;
            let row = |s: usize| &partial[(slots.start + s) * tiles + tile].0[..];
            self.cpu.level.run(Combine { addend: self.addend, start, weights, row, out });
        }
    }

    /// One task per expert and block of rows.
    fn run_by_expert(&self, out: &mut [f32]) {
        let cpu = self.cpu;
        let assignments = self.ids.len();
        let experts = self.experts.0.len();
        let mut offsets = cpu.workspace.indices.take(experts + 1);
        let mut tokens = cpu.workspace.indices.take(assignments);
        let mut inverse = cpu.workspace.indices.take(assignments);
        group(self.ids, &mut offsets, &mut tokens, &mut inverse);
        let ordered = self.ordered_rows(|row| tokens[row] as usize);
        for assignment in &mut *tokens {
            *assignment /= self.top_k as u32;
        }
        let x = match &ordered {
            Some(ordered) => self.activations(ordered, true),
            None => self.activations(self.x, true).with_index(&tokens),
        };
        let mut sorted = cpu.workspace.floats.take(assignments * self.hidden);
        let mut rest = &mut sorted[..];
        let mut tasks = Vec::new();
        for e in 0..experts {
            let (mut row, end) = (offsets[e] as usize, offsets[e + 1] as usize);
            while row < end {
                let count = ROW_BLOCK.min(end - row);
                let (block, others) = rest.split_at_mut(count * self.hidden);
                rest = others;
                tasks.push((e, row..row + count, block));
                row += count;
            }
        }
        cpu.pool.for_items(tasks, |(e, rows, out)| {
            self.expert_rows(&self.experts.0[e], &x, rows, out);
        });
        cpu.for_rows(out, self.hidden, |t, out| {
            let inverse = &inverse[t * self.top_k..(t + 1) * self.top_k];
            let weights = &self.weights[t * self.top_k..(t + 1) * self.top_k];
            let row = |s: usize| &sorted[inverse[s] as usize * self.hidden..][..self.hidden];
            self.cpu.level.run(Combine { addend: self.addend, start: t * self.hidden, weights, row, out });
        });
    }

    /// The gated MLP of one expert for some sorted rows.
    fn expert_rows(&self, expert: &PackedExpert, x: &Activations<'_>, rows: Range<usize>, out: &mut [f32]) {
        let (cpu, count) = (self.cpu, rows.len());
        let gated = Gated { gate: &expert.gate, up: &expert.up, activation: self.activation };
        let mut panels = cpu.panels(self.hidden.max(self.intermediate));
        let (step, down_step) = (gated.step(), expert.down.step());
        let mut acc = cpu.workspace.lines.take((2 * step).max(down_step) * count);
        let mut hidden = cpu.workspace.floats.take(count * self.intermediate);
        let end = expert.gate.tiles();
        for tile in (0..end).step_by(step) {
            let tiles = tile..end.min(tile + step);
            cpu.gated_tiles(&gated, tiles.clone(), [x; 2], rows.clone(), &mut panels, &mut acc[..2 * step * count]);
            for (tile, lines) in tiles.zip(acc.chunks_exact(count)) {
                copy_tile(lines, tile, expert.gate.columns(tile), &mut hidden);
            }
        }
        let h = cpu.activations(&hidden, self.intermediate, &[&expert.down], false);
        let end = expert.down.tiles();
        for tile in (0..end).step_by(down_step) {
            let tiles = tile..end.min(tile + down_step);
            cpu.multiply_any(&expert.down, tiles.clone(), &h, 0..count, &mut panels, &mut acc);
            for (tile, lines) in tiles.zip(acc.chunks_exact_mut(count)) {
                self.add_bias(expert.down.bias_line(tile), lines);
                copy_tile(lines, tile, expert.down.columns(tile), out);
            }
        }
    }
}

/// Puts the lines of a tile, one per row, into their columns of a row-major matrix.
fn copy_tile(lines: &[Line<f32>], tile: usize, columns: usize, out: &mut [f32]) {
    let width = out.len() / lines.len();
    for (line, row) in lines.iter().zip(out.chunks_exact_mut(width)) {
        row[tile * LANES..][..columns].copy_from_slice(&line.0[..columns]);
    }
}

impl MoeOps for Cpu {
    fn run_moe_route(&self, args: RouteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_route";
        let experts = args.logits.columns();
        let logits = f32s(OP, "logits", args.logits)?;
        if let Some(i) = logits.iter().position(|z| z.is_nan()) {
            return Err(nan_logit_error(i / experts, i % experts));
        }
        let bias = optional_f32s(OP, "bias", args.bias)?;
        let routing = &args.routing;
        let ids = u32s_mut(OP, "ids", args.ids)?;
        let weights = f32s_mut(OP, "weights", args.weights)?;
        let top_k = routing.top_k;
        let mut work = self.workspace.doubles.take(2 * experts + routing.n_group);
        let (scores, rest) = work.split_at_mut(experts);
        let (selection, group_scores) = rest.split_at_mut(experts);
        let mut work = Scores { scores, selection, group_scores };
        let tokens = logits.chunks_exact(experts);
        let outputs = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
        for (t, (logits, (ids, weights))) in tokens.zip(outputs).enumerate() {
            route_token(logits, bias, routing, &mut work, ids, weights).ok_or_else(|| no_expert_error(t))?;
        }
        Ok(())
    }

    fn run_moe_group(&self, args: GroupArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_group";
        let ids = u32s(OP, "ids", args.ids)?;
        check_ids(ids, args.ids.columns(), args.experts)?;
        let offsets = u32s_mut(OP, "offsets", args.offsets)?;
        let permutation = u32s_mut(OP, "permutation", args.permutation)?;
        group(ids, offsets, permutation, u32s_mut(OP, "inverse", args.inverse)?);
        Ok(())
    }

    fn run_moe_expert_mlp(&self, args: ExpertMlpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_expert_mlp";
        let ids = u32s(OP, "ids", args.ids)?;
        let top_k = args.ids.columns();
        check_ids(ids, top_k, args.experts.count())?;
        let mlp = ExpertMlp {
            cpu: self,
            x: f32s(OP, "x", args.x)?,
            ids,
            weights: f32s(OP, "weights", args.weights)?,
            experts: args.experts.data(),
            activation: args.activation,
            hidden: args.experts.hidden(),
            intermediate: args.experts.intermediate(),
            top_k,
            addend: Addend::of(OP, &args.residual)?,
        };
        let tokens = args.x.rows();
        let out = f32s_mut(OP, "out", args.out)?;
        match tokens <= DECODE_TOKENS {
            true => mlp.run_by_slot(out),
            false => mlp.run_by_expert(out),
        }
        Ok(())
    }

    fn run_moe_combine(&self, args: CombineArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_combine";
        let (rows, columns) = (args.rows.rows(), args.rows.columns());
        let inverse = u32s(OP, "inverse", args.inverse)?;
        if let Some(a) = inverse.iter().position(|&i| i as usize >= rows) {
            return Err(inverse_index_error(a, inverse[a], rows));
        }
        let z = f32s(OP, "rows", args.rows)?;
        let weights = f32s(OP, "weights", args.weights)?;
        let top_k = args.weights.columns();
        let addend = Addend::of(OP, &args.residual)?;
        let out = f32s_mut(OP, "out", args.out)?;
        if columns == 0 {
            return Ok(());
        }
        self.for_rows(out, columns, |t, out| {
            let inverse = &inverse[t * top_k..(t + 1) * top_k];
            let row = |s: usize| &z[inverse[s] as usize * columns..][..columns];
            let weights = &weights[t * top_k..(t + 1) * top_k];
            self.level.run(Combine { addend, start: t * columns, weights, row, out });
        });
        Ok(())
    }

    fn run_moe_aux_loss(&self, args: AuxLossArgs<'_, Self>) -> Result<()> {
        aux_loss::moe_aux_loss(self, args)
    }

    fn run_moe_grouped_gemm(&self, args: GroupedGemmArgs<'_, Self>) -> Result<()> {
        grouped::moe_grouped_gemm(self, args)
    }
}
