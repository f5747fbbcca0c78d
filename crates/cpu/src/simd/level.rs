use super::Kernel;
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    /// Plain Rust.
    Portable(Portable),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// NEON with dot products.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Level {
    /// Always present.
    pub(crate) const PORTABLE: Self = Self::Portable(Portable);

    /// AVX2 if the machine has it.
    pub(crate) fn avx2() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return Avx2::detect().map(Self::Avx2);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// AVX-512 if the machine has it.
    pub(crate) fn avx512() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return Avx512::detect().map(Self::Avx512);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// NEON with dot products if the machine has it.
    pub(crate) fn neon() -> Option<Self> {
        #[cfg(target_arch = "aarch64")]
        return Neon::detect().map(Self::Neon);
        #[cfg(not(target_arch = "aarch64"))]
        None
    }

    /// The widest instruction set of this machine.
    pub(crate) fn best() -> Self {
        Self::avx512().or_else(Self::avx2).or_else(Self::neon).unwrap_or(Self::PORTABLE)
    }

    /// Every instruction set of this machine.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        [Some(Self::PORTABLE), Self::avx2(), Self::avx512(), Self::neon()].into_iter().flatten()
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable(s) => kernel.run(s),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => s.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(s) => s.run(kernel),
        }
    }

    /// Whether this machine sums bytes best by products.
    pub(crate) fn sums_bytes_by_products(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.sums_bytes_by_products(),
            _ => false,
        }
    }

    /// [`Level::run`] for kernels that decode trellises, with byte permutations where the machine has them.
    #[inline]
    pub(crate) fn run_trellis<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => match s.with_vbmi() {
                Some(s) => s.run(kernel),
                None => s.run(kernel),
            },
            other => other.run(kernel),
        }
    }
}
