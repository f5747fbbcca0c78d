//! Linear layers.

mod batched;

use super::{Oracle, OracleWeight, floats, norm::rms_rows, special::activate, store, words};
use crate::activation::{ACTIVATION_BLOCK, quantize_activation_block};
use crate::linear::{
    EmbeddingArgs, EpilogueArgs, GatedUpArgs, GemmBatchedArgs, InputNorm, LinearArgs, LinearOps, Projection,
    ProjectionsArgs, Residual, embedding_id_error,
};
use crate::{Result, Tensor};

impl OracleWeight {
    /// `x W + bias` for one row of K activations.
    pub(super) fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut ordered = x.to_vec();
        if let Some(order) = &self.input_order {
            order.gather(x, &mut ordered);
        }
        let x = if self.int8_activations { round_activations(&ordered) } else { ordered };
        (0..self.out_features).map(|n| dot(&x, self.row(n)) + self.bias[n]).collect()
    }

    /// The K weights of output feature `n`, as they are stored.
    pub(super) fn row(&self, n: usize) -> &[f64] {
        &self.values[n * self.in_features..][..self.in_features]
    }
}

/// `sum_i a_i b_i`.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What the fast CPU mode makes of a row of activations: `code * scale` per block.
fn round_activations(x: &[f64]) -> Vec<f64> {
    let x: Vec<f32> = x.iter().map(|&v| v as f32).collect();
    let mut rounded = Vec::with_capacity(x.len());
    let mut codes = [0i8; ACTIVATION_BLOCK];
    for block in x.chunks(ACTIVATION_BLOCK) {
        let scale = f64::from(quantize_activation_block(block, &mut codes));
        rounded.extend(codes[..block.len()].iter().map(|&code| f64::from(code) * scale));
    }
    rounded
}

/// A row as the products of an operation with an input norm read it.
fn normalized(x: &[f64], norm: Option<&InputNorm<'_, Oracle>>) -> Vec<f64> {
    match norm {
        Some(norm) if !x.is_empty() => rms_rows(x, x.len(), Some(norm.gamma), norm.gamma_offset, norm.eps),
        _ => x.to_vec(),
    }
}

/// The values that an epilogue adds, `[elements of out]`.
pub(super) fn residual_values(residual: &Residual<'_, Oracle>, out: &Tensor<Oracle>) -> Vec<f64> {
    match residual {
        Residual::None => vec![0.0; out.elements()],
        Residual::Add(tensor) => floats(tensor).to_vec(),
        Residual::InPlace => floats(out).to_vec(),
    }
}

impl LinearOps for Oracle {
    fn run_linear(&self, args: LinearArgs<'_, Self>) -> Result<()> {
        let weight = args.weight.data();
        let (k, n) = (weight.in_features, weight.out_features);
        let residual = residual_values(&args.residual, args.out);
        for m in 0..args.x.rows() {
            let x = &floats(args.x)[m * k..][..k];
            let y: Vec<f64> = weight
                .apply(x)
                .into_iter()
                .zip(&residual[m * n..])
                .map(|(v, r)| activate(args.activation, v) * f64::from(args.out_scale) + r)
                .collect();
            store(args.out, m * n, &y);
        }
        Ok(())
    }

    fn run_projections(&self, args: ProjectionsArgs<'_, '_, Self>) -> Result<()> {
        let k = args.x.columns();
        for m in 0..args.x.rows() {
            let x = normalized(&floats(args.x)[m * k..][..k], args.norm.as_ref());
            for Projection { weight, out } in &mut *args.projections {
                let weight = weight.data();
                store(out, m * weight.out_features, &weight.apply(&x));
            }
        }
        Ok(())
    }

    fn run_gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()> {
        let (gate, up) = (args.gate.data(), args.up.data());
        let (k, n) = (gate.in_features, gate.out_features);
        for m in 0..args.x.rows() {
            let x = &normalized(&floats(args.x)[m * k..][..k], args.norm.as_ref());
            let h: Vec<f64> =
                gate.apply(x).into_iter().zip(up.apply(x)).map(|(g, u)| activate(args.activation, g) * u).collect();
            store(args.out, m * n, &h);
        }
        Ok(())
    }

    fn run_embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()> {
        let table = args.table.data();
        let vocab = table.out_features;
        let ids = words(args.ids);
        if let Some(t) = ids.iter().position(|&id| id as usize >= vocab) {
            return Err(embedding_id_error(t, ids[t], vocab));
        }
        for (t, &id) in ids.iter().enumerate() {
            store(args.out, t * table.in_features, table.row(id as usize));
        }
        Ok(())
    }

    fn run_gemm_batched(&self, args: GemmBatchedArgs<'_, Self>) -> Result<()> {
        batched::gemm_batched(args)
    }

    fn run_apply_epilogue(&self, args: EpilogueArgs<'_, Self>) -> Result<()> {
        batched::apply_epilogue(args)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, dense, empty, ids, tensor};
    use super::*;
    use crate::linear::Activation;
    use crate::{Device, HostTensor, Linear, Weight};
    use marlin_formats::{Format, QuantizedMatrix, Scheme};

    #[test]
    fn epilogue_order_is_bias_activation_scale_residual() {
        let oracle = Oracle::new();
        let host = HostTensor::from_f32(&[2, 2], &[1.0, 2.0, -3.0, 1.0]).unwrap();
        let weight = Weight::dense(host).unwrap().with_bias(vec![0.5, 0.25]).unwrap();
        let weight = Linear::new(&oracle, weight).unwrap();
        let x = tensor(&[1, 2], &[1.0, 2.0]);
        let mut out = tensor(&[1, 2], &[10.0, 20.0]);
        // x W + bias = [5.5, -0.75]; relu [5.5, 0]; times 2 [11, 0]; plus the previous contents.
        let args = LinearArgs {
            x: &x,
            weight: &weight,
            activation: Activation::Relu,
            out_scale: 2.0,
            residual: Residual::InPlace,
            out: &mut out,
        };
        oracle.linear(args).unwrap();
        assert_eq!(oracle.read_f64(&out).unwrap(), [21.0, 20.0]);
    }

    #[test]
    fn gated_product() {
        let oracle = Oracle::new();
        let (gate, up) = (dense(1, 2, &[1.0, 0.0]), dense(1, 2, &[0.0, 3.0]));
        let x = tensor(&[1, 2], &[1.0, 2.0]);
        let mut out = empty(&[1, 1]);
        let args = GatedUpArgs { x: &x, norm: None, gate: &gate, up: &up, activation: Activation::Silu, out: &mut out };
        oracle.gated_up(args).unwrap();
        assert_close(&oracle.read_f64(&out).unwrap(), &[0.731_058_578_630_004_9 * 6.0], 1e-14);
    }

    #[test]
    fn embedding_rows_and_bad_ids() {
        let oracle = Oracle::new();
        let table = dense(3, 2, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let mut out = empty(&[2, 2]);
        let mut look_up = |wanted: &[u32]| {
            let ids = ids(&[2], wanted);
            let args = EmbeddingArgs { ids: &ids, table: &table, out: &mut out };
            oracle.embedding(args).map(|()| oracle.read_f64(&out).unwrap())
        };
        assert_eq!(look_up(&[2, 0]).unwrap(), [4.0, 5.0, 0.0, 1.0]);
        assert!(look_up(&[0, 3]).unwrap_err().to_string().contains("[1] is 3"));
    }

    #[test]
    fn int8_activations_round_blocks_of_integer_schemes_only() {
        let product = |oracle: Oracle, format: Format| {
            let scheme = Scheme::new(format, 32).unwrap();
            let matrix = QuantizedMatrix::encode(scheme, &[1.0; 64], 1, 64).unwrap();
            let weight = Linear::new(&oracle, Weight::quantized(matrix).unwrap()).unwrap();
            let mut values = [0.0f32; 64];
            (values[0], values[1]) = (2.0, 1.0);
            let x = tensor(&[1, 64], &values);
            let mut out = empty(&[1, 1]);
            let args = LinearArgs {
                x: &x,
                weight: &weight,
                activation: Activation::None,
                out_scale: 1.0,
                residual: Residual::None,
                out: &mut out,
            };
            oracle.linear(args).unwrap();
            (oracle.read_f64(&out).unwrap()[0], weight.data().row(0)[0])
        };
        let scale = f64::from(2.0f32 / 127.0);
        let (y, w) = product(Oracle::with_int8_activations(), Format::Int4S4);
        assert_close(&[y], &[(127.0 + 64.0) * scale * w], 1e-12);
        let (y, w) = product(Oracle::new(), Format::Int4S4);
        assert_close(&[y], &[3.0 * w], 1e-12);
        let (y, w) = product(Oracle::with_int8_activations(), Format::Fp8E4m3);
        assert_close(&[y], &[3.0 * w], 1e-12);
    }
}
