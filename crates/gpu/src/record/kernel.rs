//! A recorded kernel.

use cubecl::hash::StableHasher;
use cubecl::prelude::KernelId;
use cubecl::{CompilationError, CubeDim};

use super::properties::{BINDINGS, THREADGROUP_BYTES, UNITS};
use super::text::const_atomics;

/// A kernel in the Metal Shading Language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MslKernel {
    /// Modules and function: `norm::norm_rows`.
    pub name: String,
    /// The function in the text.
    pub entry_point: String,
    /// What it is compiled for, as the kernel's compile-time arguments print themselves; one line.
    pub configuration: String,
    /// Differs between the configurations of a name; the same in every build of the same kernels.
    pub hash: u64,
    /// Threads of a threadgroup along each dimension.
    pub cube_dim: [u32; 3],
    /// Threadgroup memory in bytes.
    pub threadgroup_bytes: usize,
    /// The program, with the one entry point.
    pub text: String,
}

impl MslKernel {
    /// A name for a file, without an ending: `norm.norm_rows.0123456789ab`.
    pub fn file_stem(&self) -> String {
        format!("{}.{:012x}", self.name.replace("::", "."), self.hash)
    }

    /// What Metal would refuse in this kernel, as far as it shows without a Metal compiler: instructions that the
    /// dialect lacks, threadgroup memory, threads or buffers beyond the limits, atomics that may not be written.
    pub fn defects(&self) -> Vec<String> {
        let mut defects: Vec<_> =
            self.text.lines().filter(|line| line.contains("#error")).map(|line| line.trim().to_owned()).collect();
        let mut limit = |what: &str, found: usize, most: usize| {
            if found > most {
                defects.push(format!("{found} {what}, at most {most} are allowed"));
            }
        };
        limit("bytes of threadgroup memory", self.threadgroup_bytes, THREADGROUP_BYTES);
        limit("threads in a threadgroup", self.cube_dim.iter().product::<u32>() as usize, UNITS as usize);
        limit("buffers", self.text.matches("[[buffer(").count(), BINDINGS as usize + 1);
        defects.extend(const_atomics(&self.text).map(|line| format!("const atomic: {line}")));
        defects
    }
}

/// A kernel that did not become text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileError {
    /// As in [`MslKernel::name`].
    pub name: String,
    /// As in [`MslKernel::configuration`].
    pub configuration: String,
    /// What the compiler says.
    pub reason: String,
}

impl CompileError {
    pub(super) fn new(name: &str, id: &KernelId, reason: String) -> Self {
        Self { name: name.to_owned(), configuration: configuration(id), reason }
    }

    pub(super) fn compilation(name: &str, id: &KernelId, error: &CompilationError) -> Self {
        Self::new(name, id, error.to_string())
    }
}

/// Modules and function of the type `marlin_gpu::norm::norm_rows::NormRows<..>` that CubeCL makes of a kernel.
pub(super) fn name(type_name: &str) -> String {
    let path = type_name.split('<').next().unwrap_or(type_name);
    let path = path.rsplit_once("::").map_or(path, |(modules, _)| modules);
    path.split_once("::").map_or(path, |(_, inner)| inner).to_owned()
}

/// The compile-time arguments of a kernel, in one line.
pub(super) fn configuration(id: &KernelId) -> String {
    id.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A hash of everything that a kernel is compiled for. CubeCL's own hash contains type ids, which differ between builds.
pub(super) fn hash(id: &KernelId) -> u64 {
    let bits = StableHasher::hash_one(&id.stable_format());
    (bits as u64) & 0xffff_ffff_ffff
}

/// Extents of a cube.
pub(super) fn extents(cube: CubeDim) -> [u32; 3] {
    [cube.x, cube.y, cube.z]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(text: &str) -> MslKernel {
        MslKernel {
            name: "norm::norm_rows".into(),
            entry_point: "norm_rows".into(),
            configuration: String::new(),
            hash: 0xab,
            cube_dim: [32, 4, 1],
            threadgroup_bytes: 512,
            text: text.into(),
        }
    }

    #[test]
    fn names_and_files() {
        assert_eq!(name("marlin_gpu::norm::norm_rows::NormRows<marlin_gpu::record::MslRecorder>"), "norm::norm_rows");
        assert_eq!(kernel("").file_stem(), "norm.norm_rows.0000000000ab");
    }

    #[test]
    fn defects_are_found() {
        let good = "kernel void f(device atomic_uint* a [[buffer(0)]]) {}";
        assert!(kernel(good).defects().is_empty());
        assert_eq!(kernel("half x;\n  #error no such type\n").defects(), ["#error no such type"]);
        assert_eq!(kernel("const threadgroup atomic_uint* x = y;").defects().len(), 1);
        let large = MslKernel { threadgroup_bytes: 32_769, cube_dim: [32, 33, 1], ..kernel(good) };
        assert_eq!(large.defects().len(), 2);
        let buffers: String = (0..32).map(|i| format!("[[buffer({i})]]")).collect();
        assert_eq!(kernel(&buffers).defects().len(), 1);
    }
}
