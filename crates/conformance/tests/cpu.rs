//! The CPU backend in both modes with every instruction set. A set of another processor family is reported as ignored;
//! one that a machine of its family lacks prints a line `SKIPPED` on the standard error.

use std::io::Write;

use marlin_conformance::{Family, Mode, VerifyOptions, verify};
use marlin_cpu::{Cpu, CpuOptions, Isa};

/// Families with products of weights: the fast mode is another arithmetic in them alone.
const PRODUCTS: [Family; 3] = [Family::Linear, Family::Attention, Family::Moe];

/// Every case passes in the mode; in the fast one, of the families that it changes.
fn passes(isa: Isa, exact: bool) {
    let cpu = match Cpu::new(CpuOptions { exact, isa, ..CpuOptions::default() }) {
        Ok(cpu) => cpu,
        // Only the portable one exists on every machine.
        Err(error) if isa != Isa::Portable => {
            // Past the capture of the test harness, which hides what passing tests print.
            let line = format!("SKIPPED: conformance with {isa:?} because {error}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(cpu.isa(), isa);
    let device = format!("cpu {isa:?}");
    let families = (!exact).then(|| PRODUCTS.to_vec());
    let mode = if exact { Mode::Exact } else { Mode::Int8Activations };
    let report = verify(&cpu, &VerifyOptions { mode, families, device, ..VerifyOptions::default() });
    let failures: Vec<_> = report.failures().collect();
    println!("{isa:?}, exact {exact}: {} passed, {} failed", report.passed, report.failed);
    assert!(failures.is_empty(), "{} failures: {failures:#?}", failures.len());
    assert!(report.passed > 1000);
}

/// A test of an instruction set in each mode; without one of its processor family both are ignored.
macro_rules! tests {
    ($name:ident, $isa:ident $(, on $family:literal: $reason:literal)?) => {
        mod $name {
            #[test]
            $(#[cfg_attr(not(target_arch = $family), ignore = $reason)])?
            fn exact() {
                super::passes(super::Isa::$isa, true);
            }

            #[test]
            $(#[cfg_attr(not(target_arch = $family), ignore = $reason)])?
            fn fast() {
                super::passes(super::Isa::$isa, false);
            }
        }
    };
}

tests!(portable, Portable);
tests!(avx2, Avx2, on "x86_64": "needs an x86-64 machine");
tests!(avx512, Avx512, on "x86_64": "needs an x86-64 machine");
tests!(neon, Neon, on "aarch64": "needs an aarch64 machine; tools/aarch64.sh emulates one");

/// What nobody chose is the widest set that works, or the one that `MARLIN_ISA` names.
#[test]
fn the_default_is_the_best() {
    let has = |isa| Cpu::new(CpuOptions { isa, threads: Some(1), ..CpuOptions::default() }).is_ok();
    let best = [Isa::Neon, Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().find(|&isa| has(isa));
    let chosen = match std::env::var("MARLIN_ISA").as_deref() {
        Ok("portable") => Some(Isa::Portable),
        Ok("avx2") => Some(Isa::Avx2),
        Ok("avx512") => Some(Isa::Avx512),
        Ok("neon") => Some(Isa::Neon),
        _ => best,
    };
    assert_eq!(Some(Cpu::new(CpuOptions::default()).unwrap().isa()), chosen);
}

/// The fast mode does round activations, and the exact oracle notices.
#[test]
fn fast_is_not_exact() {
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let options = VerifyOptions { families: Some(vec![Family::Linear]), ..VerifyOptions::default() };
    assert!(verify(&cpu, &options).failed > 100);
}
