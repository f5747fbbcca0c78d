//! Metal without a Mac: a device that compiles every launched kernel to the Metal Shading Language as a Mac would, keeps
//! the text, and runs nothing.
//!
//! Whatever drives a device, the conformance suite above all, thereby lists the kernels that it needs on Metal. Memory
//! holds what was written to it and is zero otherwise: kernels leave their outputs as they were.

mod kernel;
mod log;
mod properties;
mod server;
#[cfg(test)]
mod tests;
mod text;
mod write;

use std::sync::atomic::{AtomicU16, Ordering};

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::device::{Device, DeviceId};
use cubecl::future::block_on;
use cubecl::ir::TargetProperties;
use cubecl::zspace::{Shape, Strides};
use cubecl_cpp::MslCompiler;

pub use kernel::{CompileError, MslKernel};
pub use write::{WriteError, expect_new, write_msl};

use crate::Gpu;
use log::Log;
use server::RecordingServer;

/// The device that records.
pub type Recorder = Gpu<MslRecorder>;

/// Opens a recording device with Metal's properties: planes of 32, 32 KiB of threadgroup memory, matrices of 8x8, half
/// and bfloat. Each has a recording of its own.
pub fn msl() -> (Recorder, Recording) {
    // Devices of one number share a server.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let client = MslRecorder::client(&RecordingDevice(NEXT.fetch_add(1, Ordering::Relaxed)));
    (Gpu::new(client.clone(), "msl"), Recording { client })
}

/// What a [`Recorder`] has recorded.
#[derive(Clone)]
pub struct Recording {
    client: ComputeClient<MslRecorder>,
}

impl Recording {
    /// Every distinct kernel launched so far, in the order of its first launch.
    pub fn kernels(&self) -> Vec<MslKernel> {
        self.log().state().kernels.clone()
    }

    /// The kernels that did not compile, in the order of their first launch.
    pub fn errors(&self) -> Vec<CompileError> {
        self.log().state().errors.clone()
    }

    /// What Metal would refuse, as far as it shows without a Metal compiler: kernels that did not become text, and the
    /// defects of those that did. Empty is good.
    pub fn faults(&self) -> Vec<String> {
        let errors = self.errors();
        let errors = errors.iter().map(|error| format!("{} [{}]: {}", error.name, error.configuration, error.reason));
        let kernels = self.kernels();
        let defects = kernels
            .iter()
            .flat_map(|kernel| kernel.defects().into_iter().map(|defect| format!("{}: {defect}", kernel.file_stem())));
        errors.chain(defects).collect()
    }

    /// How many launches there were.
    pub fn launches(&self) -> usize {
        self.log().state().launches
    }

    /// The log, complete: the server works through its launches on a thread of its own.
    fn log(&self) -> &Log {
        // The server never fails to synchronize.
        let _ = block_on(self.client.sync());
        self.client.info()
    }
}

/// The CubeCL runtime behind a [`Recorder`].
#[derive(Clone, Debug)]
pub struct MslRecorder;

/// One of any number of recording devices.
#[derive(Clone, Debug, Default)]
pub struct RecordingDevice(u16);

impl Device for RecordingDevice {
    fn from_id(id: DeviceId) -> Self {
        Self(id.index_id)
    }

    fn to_id(&self) -> DeviceId {
        DeviceId::new(0, self.0)
    }
}

impl Runtime for MslRecorder {
    type Compiler = MslCompiler;
    type Server = RecordingServer;
    type Device = RecordingDevice;

    fn client(device: &RecordingDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_client: &ComputeClient<Self>) -> &'static str {
        "msl"
    }

    fn max_cube_count() -> (u32, u32, u32) {
        properties::MOST_CUBES
    }

    fn can_read_tensor(_shape: &Shape, _strides: &Strides) -> bool {
        true
    }

    fn target_properties() -> TargetProperties {
        TargetProperties { mma: Default::default() }
    }

    fn enumerate_devices(type_id: u16, _info: &Log) -> Vec<DeviceId> {
        vec![DeviceId::new(type_id, 0)]
    }
}
