//! Mixed precision: the allocation on given losses, and the measurement of a small model.

mod common;

use common::chain::{K, Memory, Source, fixture};
use marlin_formats::{Format, Scheme};
use marlin_quantize::{
    After, GptqOptions, Hessian, Method, Mixture, Sensitivity, Settings, allocate_formats, gptq, measure_model,
    quantize_model,
};

fn candidates() -> Vec<Scheme> {
    [Format::Int2, Format::Int3, Format::Int4S4, Format::Int8].map(Scheme::with_default_group).to_vec()
}

fn block(weights: u64, losses: [f64; 4]) -> Sensitivity {
    Sensitivity { block: format!("b{weights}"), weights, losses: losses.to_vec() }
}

fn average(blocks: &[Sensitivity], chosen: &[usize]) -> f64 {
    let bits =
        |(block, &c): (&Sensitivity, &usize)| f64::from(candidates()[c].format.code_bits()) * block.weights as f64;
    blocks.iter().zip(chosen).map(bits).sum::<f64>() / blocks.iter().map(|block| block.weights as f64).sum::<f64>()
}

#[test]
fn bits_go_where_they_save_most() {
    let falling = |size: f64| [size, size / 4.0, size / 16.0, size / 4096.0];
    let blocks =
        [block(100, falling(1.0)), block(100, falling(8.0)), block(100, falling(0.1)), block(100, falling(0.1))];
    let allocate = |bits: f64| allocate_formats(&blocks, &candidates(), bits).unwrap();
    assert_eq!(allocate(2.0), [0, 0, 0, 0]);
    assert_eq!(allocate(2.25), [0, 1, 0, 0]);
    assert_eq!(allocate(2.5), [0, 2, 0, 0]);
    assert_eq!(allocate(2.75), [1, 2, 0, 0]);
    // The last bit is of no use to the large block, so that it goes to the first of the equal ones.
    assert_eq!(allocate(3.25), [2, 2, 1, 0]);
    assert_eq!(allocate(8.0), [3, 3, 3, 3]);
    let mut before = f64::INFINITY;
    for step in 0..=60 {
        let bits = 2.0 + f64::from(step) / 10.0;
        let chosen = allocate(bits);
        assert!(average(&blocks, &chosen) <= bits + 1e-9);
        let loss: f64 = blocks.iter().zip(&chosen).map(|(block, &c)| block.losses[c]).sum();
        assert!(loss <= before + 1e-12, "{bits}");
        before = loss;
    }
}

#[test]
fn the_best_of_all_allocations_is_met_where_steps_fit() {
    let mut random = common::Random::new(5);
    for _ in 0..20 {
        // Equal sizes: every prefix of the steps fits some budget exactly, where greedy is optimal.
        let blocks: Vec<Sensitivity> = (0..4)
            .map(|_| {
                let start = random.uniform() * 10.0;
                block(10, [start, start * 0.3, start * 0.1, 0.0])
            })
            .collect();
        let chosen = allocate_formats(&blocks, &candidates(), 3.0).unwrap();
        let loss = |chosen: &[usize]| blocks.iter().zip(chosen).map(|(block, &c)| block.losses[c]).sum::<f64>();
        let all = (0..256usize).map(|i| [i & 3, i >> 2 & 3, i >> 4 & 3, i >> 6 & 3]);
        let best = all.filter(|c| average(&blocks, c) <= 3.0).map(|c| loss(&c)).fold(f64::INFINITY, f64::min);
        assert!(loss(&chosen) <= best + 1e-9, "{} against {best}", loss(&chosen));
    }
}

#[test]
fn formats_off_the_hull_and_odd_budgets() {
    // Three bits are worse than a mix of two and four: the hull leaves them out.
    let blocks = [block(100, [1.0, 0.9, 0.1, 0.09]), block(100, [1.0, 1.5, 2.0, 1.0])];
    assert_eq!(allocate_formats(&blocks, &candidates(), 3.0).unwrap(), [2, 0]);
    assert_eq!(allocate_formats(&blocks, &candidates(), 2.5).unwrap(), [0, 0]);
    for bits in [1.9, 8.1, f64::NAN] {
        let error = allocate_formats(&blocks, &candidates(), bits).unwrap_err().to_string();
        assert!(error.contains("bits is"), "{error}");
    }
    let blocks = [block(100, [1.0, f64::NAN, 0.1, 0.0])];
    assert!(allocate_formats(&blocks, &candidates(), 3.0).unwrap_err().to_string().contains("b100"));
}

#[test]
fn measured_losses_are_those_of_gptq_and_are_not_measured_twice() {
    let options = GptqOptions::default();
    let candidates = candidates();
    let mut first = fixture();
    let mixture = Mixture { assignments: &first.assignments, candidates: &candidates, options };
    let mut store = Memory::default();
    let source = Source(first.weights.clone());
    let measured = measure_model(mixture, &source, &mut first.chain, &mut store, &|_| {}).unwrap();
    assert_eq!((measured.parts, store.parts.len()), (2, 2));
    let names: Vec<&str> = measured.blocks.iter().map(|block| block.block.as_str()).collect();
    let expected = ["model.layers.0", "model.layers.0.experts", "model.layers.1", "model.layers.1.experts"];
    assert_eq!(names, expected);
    assert_eq!(measured.blocks[0].weights, 2 * (K * K) as u64);

    // The loss of the first block by hand: q_proj and k_proj see all rows.
    let mut hessian = Hessian::new(K).unwrap();
    fixture().chain.streams.iter().for_each(|x| hessian.accumulate(x).unwrap());
    for (c, &scheme) in candidates.iter().enumerate() {
        let loss = |name: &str| {
            let weight = &source.0[&format!("model.layers.0.{name}")];
            let zero = vec![0.0; weight.len()];
            let whole = marlin_quantize::proxy_loss(&hessian, weight, &zero).unwrap();
            gptq(scheme, weight, K, K, &hessian, &options).unwrap().loss / whole
        };
        let (found, expected) = (measured.blocks[0].losses[c], loss("q_proj") + loss("k_proj"));
        assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    }
    // Experts count by the tokens they see: two of 300 rows, and none.
    assert!(measured.blocks[1].losses[0] < 0.02 * measured.blocks[0].losses[0]);

    // Interrupted after each part, and complete.
    for done in 0..=2 {
        let mut again = fixture();
        let mixture = Mixture { assignments: &first.assignments, candidates: &candidates, options };
        let mut partial = Memory { parts: store.parts[..done].to_vec(), full_after: None };
        assert_eq!(measure_model(mixture, &source, &mut again.chain, &mut partial, &|_| {}).unwrap(), measured);
        assert_eq!(partial.parts, store.parts);
        assert_eq!(again.chain.loaded.len(), if done < 2 { 2 } else { 0 });
    }

    // The quantization goes on in the same store.
    let method = Method::Gptq(options);
    let settings = Settings { assignments: &first.assignments, method, folds: &[], search: None };
    let mut alone = Memory::default();
    quantize_model(settings, &source, Some(&mut fixture().chain), &mut alone, &|_| {}).unwrap();
    let mut after = After { parts: measured.parts, store: &mut store };
    let summary = quantize_model(settings, &source, Some(&mut fixture().chain), &mut after, &|_| {}).unwrap();
    assert_eq!(summary.restored, 0);
    assert_eq!(store.parts[2..], alone.parts);
}
