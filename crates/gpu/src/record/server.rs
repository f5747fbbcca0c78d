//! The server of a recording device: memory in the host's, launches into the log.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use cubecl::bytes::Bytes;
use cubecl::device::{DeviceId, DeviceService, ServerUtilitiesHandle};
use cubecl::dry_run::LaunchMode;
use cubecl::future::DynFut;
use cubecl::prelude::KernelId;
use cubecl::profile::ProfileDuration;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, IoError, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::{CompilationError, CubeCount, CubeTask, ExecutionMode, MemoryConfiguration, MemoryUsage};
use cubecl_cpp::MslCompiler;
use cubecl_cpp::shared::CompilationOptions;
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::kernel::KernelMetadata;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryManagement, MemoryManagementOptions,
};
use cubecl_runtime::storage::{BytesResource, BytesStorage, ManagedResource};
use cubecl_runtime::timestamp_profiler::TimestampProfiler;

use super::kernel::{CompileError, MslKernel, configuration, extents, hash, name};
use super::log::Log;
use super::properties::{memory, properties};
use super::text::in_order;

type Task = Box<dyn CubeTask<MslCompiler>>;

/// Behind one recording device.
#[derive(Debug)]
pub struct RecordingServer {
    memory: MemoryManagement<BytesStorage>,
    profiler: TimestampProfiler,
    utilities: Arc<ServerUtilities<Self>>,
    log: Log,
    /// The first transfer that failed; the next read returns it.
    failure: Option<ServerError>,
}

impl DeviceService for RecordingServer {
    fn init(_id: DeviceId) -> Self {
        let logger = Arc::new(ServerLogger::default());
        let log = Log::default();
        let alignment = memory().alignment as usize;
        let policy = ContiguousMemoryLayoutPolicy::new(alignment);
        let memory = MemoryManagement::from_configuration(
            BytesStorage::default(),
            &memory(),
            MemoryConfiguration::ExclusivePages,
            logger.clone(),
            MemoryManagementOptions::new("msl"),
        );
        let utilities = Arc::new(ServerUtilities::new(properties(), logger, log.clone(), policy));
        Self { memory, profiler: TimestampProfiler::default(), utilities, log, failure: None }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for RecordingServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl RecordingServer {
    fn resource(&mut self, binding: &Binding) -> Result<BytesResource, IoError> {
        self.memory.get_resource(binding.memory.clone(), binding.offset_start, binding.offset_end)
    }

    fn allocate(&mut self, handle: ManagedMemoryHandle, size: u64) -> Result<(), IoError> {
        let reserved = self.memory.reserve(size)?;
        let mut resource = self.memory.get_resource(reserved.clone().binding(), None, None)?;
        // Pages are used again.
        resource.write().fill(0);
        self.memory.bind(reserved, handle, 0)
    }

    fn copy_out(&mut self, descriptor: &CopyDescriptor) -> Result<Bytes, ServerError> {
        let length = descriptor.shape.iter().product::<usize>() * descriptor.elem_size;
        let resource = self.resource(&descriptor.handle)?;
        let contents = resource.read().get(..length).ok_or_else(|| outside(&descriptor.handle, length))?;
        Ok(Bytes::from_bytes_vec(contents.to_vec()))
    }

    fn copy_in(&mut self, descriptor: &CopyDescriptor, contents: &[u8]) -> Result<(), ServerError> {
        let mut resource = self.resource(&descriptor.handle)?;
        let target = resource.write().get_mut(..contents.len());
        target.ok_or_else(|| outside(&descriptor.handle, contents.len()))?.copy_from_slice(contents);
        Ok(())
    }

    fn keep_failure<E: Into<ServerError>>(&mut self, result: Result<(), E>) {
        if let Err(error) = result {
            self.failure.get_or_insert(error.into());
        }
    }
}

fn outside(binding: &Binding, length: usize) -> ServerError {
    let reason = format!("{length} bytes of a buffer of {}", binding.size_in_used());
    ServerError::Generic { reason, backtrace: BackTrace::capture() }
}

impl ComputeServer for RecordingServer {
    type Kernel = Task;
    type Info = Log;
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Storage = BytesStorage;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _stream: StreamId) {
        let result = self.allocate(memory, size);
        self.keep_failure(result);
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let result = match self.failure.take() {
            Some(failure) => Err(failure),
            None => descriptors.iter().map(|descriptor| self.copy_out(descriptor)).collect(),
        };
        Box::pin(async move { result })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        for (descriptor, contents) in descriptors {
            let result = self.copy_in(&descriptor, &contents);
            self.keep_failure(result);
        }
    }

    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        _stream: StreamId,
    ) -> Result<ManagedResource<BytesResource>, ServerError> {
        let resource = self.resource(&binding)?;
        Ok(ManagedResource::new(binding.memory, resource))
    }

    unsafe fn launch(
        &mut self,
        kernel: Task,
        _count: CubeCount,
        _arguments: KernelArguments,
        mode: ExecutionMode,
        _stream: StreamId,
        _launch: LaunchMode,
    ) {
        let mut id = kernel.id();
        id.mode(mode);
        if !self.log.state().launch(&id) {
            return;
        }
        // Compiled without the lock: a compiler that panics must not take the log with it.
        let compiled = compile(&kernel, &id, mode);
        let mut state = self.log.state();
        match compiled {
            Ok(kernel) => state.keep(kernel),
            Err(error) => state.errors.push(error),
        }
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.memory.memory_usage())
    }

    fn memory_cleanup(&mut self, _stream: StreamId) {
        self.memory.cleanup(true);
    }

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.profiler.start())
    }

    fn end_profile(&mut self, _stream: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.profiler.stop(token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, _stream: StreamId) {
        self.memory.mode(mode);
    }
}

/// The text of a kernel. The compiler panics on what it does not know, so a panic is an error like any other.
fn compile(kernel: &Task, id: &KernelId, mode: ExecutionMode) -> Result<MslKernel, CompileError> {
    // The compiler numbers its temporaries with a counter of the process.
    static COMPILER: Mutex<()> = Mutex::new(());
    let _one_at_a_time = COMPILER.lock().unwrap_or_else(PoisonError::into_inner);
    let name = name(kernel.name());
    let compiled = catch_unwind(AssertUnwindSafe(|| text(kernel, mode)));
    let (entry_point, cube_dim, threadgroup_bytes, text) = compiled
        .map_err(|panic| CompileError::new(&name, id, reason(panic.as_ref())))?
        .map_err(|error| CompileError::compilation(&name, id, &error))?;
    Ok(MslKernel {
        name,
        entry_point,
        configuration: configuration(id),
        hash: hash(id),
        cube_dim,
        threadgroup_bytes,
        text,
    })
}

/// Entry point, extents of a cube, bytes of threadgroup memory and text.
fn text(kernel: &Task, mode: ExecutionMode) -> Result<(String, [u32; 3], usize, String), CompilationError> {
    let mut compiler = MslCompiler::default();
    let options = CompilationOptions::default();
    let compiled = kernel.compile(kernel.define(), &mut compiler, &options, mode, kernel.address_type())?;
    let bytes = compiled.repr.map_or(0, |kernel| kernel.shared_memory_size());
    Ok((compiled.entrypoint_name, extents(compiled.cube_dim), bytes, in_order(&compiled.source)))
}

fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the compiler panicked: {}", text.unwrap_or("without a message"))
}
