//! What CubeCL says of a device of the family Metal 3, the smallest that it accepts.

use cubecl::ir::features::{AtomicUsage, Features, Plane, TypeUsage};
use cubecl::ir::{
    AddressType, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties, Type, UIntKind,
};
use cubecl::profile::TimingMethod;
use cubecl_cpp::DialectWmmaCompiler;
use cubecl_cpp::metal::{MslDialect, arch::MetalArchitecture};
use cubecl_cpp::shared::register_wmma_features;

/// Threads of a threadgroup.
pub(super) const UNITS: u32 = 1024;

/// Threadgroup memory.
pub(super) const THREADGROUP_BYTES: usize = 32 * 1024;

/// Buffers of a kernel: 31, less one for its scalars.
pub(super) const BINDINGS: u32 = 30;

/// Threadgroups along each dimension: Metal's limit is higher, that of wgpu is this.
pub(super) const MOST_CUBES: (u32, u32, u32) = (65_535, 65_535, 65_535);

/// Memory, with the alignment of Metal's buffers. The size of a page is the recorder's own choice.
pub(super) fn memory() -> MemoryDeviceProperties {
    MemoryDeviceProperties { max_page_size: 1 << 30, alignment: 256 }
}

/// Everything that host code may ask about the device.
pub(super) fn properties() -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: BINDINGS,
        max_shared_memory_size: THREADGROUP_BYTES,
        max_cube_count: MOST_CUBES,
        max_units_per_cube: UNITS,
        max_cube_dim: (UNITS, UNITS, UNITS),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: "Metal 3".into(), fingerprint: "msl".into() };
    let mut properties = DeviceProperties::new(Features::default(), memory(), hardware, TimingMethod::System, identity);
    register_types(&mut properties);
    register_wmma_features(MslDialect::supported_wmma_combinations(&MetalArchitecture::Metal3), &mut properties);
    properties.features.alignment = true;
    for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        properties.features.plane.insert(plane);
    }
    properties
}

fn register_types(properties: &mut DeviceProperties) {
    for address in [AddressType::U32, AddressType::U64] {
        properties.register_address_type(address);
    }
    let unsigned = [UIntKind::U8, UIntKind::U16, UIntKind::U32, UIntKind::U64].map(ElemType::UInt);
    let signed = [IntKind::I8, IntKind::I16, IntKind::I32, IntKind::I64].map(ElemType::Int);
    let float = [FloatKind::F16, FloatKind::BF16, FloatKind::F32].map(ElemType::Float);
    for element in unsigned.into_iter().chain(signed).chain(float).chain([ElemType::Bool]) {
        properties.register_type_usage(element, TypeUsage::all());
    }
    for element in [ElemType::Int(IntKind::I32), ElemType::UInt(UIntKind::U32)] {
        properties.register_atomic_type_usage(Type::atomic(element), AtomicUsage::all());
    }
    let float = Type::atomic(ElemType::Float(FloatKind::F32));
    properties.register_atomic_type_usage(float, AtomicUsage::Add | AtomicUsage::LoadStore);
}
