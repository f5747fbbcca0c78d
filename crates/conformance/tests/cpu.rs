//! The CPU backend in both modes, with every instruction set that this machine has.

use marlin_conformance::{Family, VerifyOptions, verify};
use marlin_cpu::{Cpu, CpuOptions, Isa};

fn passes(exact: bool, isa: Isa) {
    let options = CpuOptions { exact, isa, ..CpuOptions::default() };
    let cpu = match Cpu::new(options) {
        Ok(cpu) => cpu,
        // Only the portable one exists on every machine.
        Err(error) if matches!(isa, Isa::Avx2 | Isa::Avx512) => {
            println!("{isa:?} is not tested here: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let options =
        VerifyOptions { int8_activations: !exact, device: format!("cpu {isa:?}"), ..VerifyOptions::default() };
    let report = verify(&cpu, &options);
    assert!(report.passed > 1000);
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{} failures: {failures:#?}", failures.len());
}

#[test]
fn exact() {
    passes(true, Isa::Auto);
}

#[test]
fn fast() {
    passes(false, Isa::Auto);
}

#[test]
fn portable() {
    passes(true, Isa::Portable);
    passes(false, Isa::Portable);
}

#[test]
fn avx2() {
    passes(true, Isa::Avx2);
    passes(false, Isa::Avx2);
}

/// The fast mode does round activations, and the exact oracle notices.
#[test]
fn fast_is_not_exact() {
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let options = VerifyOptions { families: Some(vec![Family::Linear]), ..VerifyOptions::default() };
    assert!(verify(&cpu, &options).failed > 100);
}
