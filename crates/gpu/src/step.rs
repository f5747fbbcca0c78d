//! Steps that run once a token. On CUDA their launches are recorded in a graph, which costs the host one call a token.
//!
//! A recorded kernel runs with the arguments that it was recorded with. What differs from token to token lies in device
//! memory: ids and positions in the caller's tensors, the cache row to write and the number of keys in the words kept here.
//! All devices read those words, so that only the recording itself is CUDA's own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cubecl::client::Graph;
use cubecl::prelude::*;
use marlin_ops::{Device, OpError, Result};

use crate::device::device_error;
use crate::{Buffer, Gpu};

/// Numbers of which device memory is kept, so that the layers of a model share them.
const KEPT: usize = 8;

/// Attempts to record a step: the runs before find out how much memory it takes.
const ATTEMPTS: usize = 3;

/// Keys that a launch for `keys` of them is shaped for: shapes change when the count doubles, not with every token.
pub(crate) fn planned_keys(keys: usize) -> usize {
    keys.next_power_of_two()
}

/// A recorded step.
pub struct Recording<R: Runtime> {
    graph: Graph<R>,
    /// [`planned_keys`] of the tokens that it is good for.
    keys: usize,
    launches: u64,
}

/// What a device needs for its steps.
pub(crate) struct Steps {
    /// Whether steps are recorded.
    graphs: AtomicBool,
    /// Launches go to a record.
    recording: AtomicBool,
    /// Position of the step at hand.
    position: Mutex<Option<usize>>,
    /// That position, and the number of keys, one more.
    words: [Buffer; 2],
    /// The latest numbers used outside of steps.
    kept: Mutex<Vec<(Vec<u32>, Buffer)>>,
}

impl Steps {
    pub(crate) fn new(words: [Buffer; 2]) -> Self {
        Self {
            graphs: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            position: Mutex::default(),
            words,
            kept: Mutex::default(),
        }
    }

    /// Records steps from now on, or not.
    pub(crate) fn use_graphs(&self, on: bool) -> bool {
        self.graphs.store(on, Ordering::Relaxed);
        on
    }

    pub(crate) fn set_recording(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Between its creation and its drop the device is in a step.
    fn enter(&self, position: usize) -> Scope<'_> {
        *lock(&self.position) = Some(position);
        Scope(self)
    }
}

/// A step at hand.
struct Scope<'a>(&'a Steps);

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.0.set_recording(false);
        *lock(&self.0.position) = None;
    }
}

/// Values are replaced whole: a panic elsewhere leaves them valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn word(operation: &'static str, number: usize) -> Result<u32> {
    u32::try_from(number).map_err(|_| OpError::value(operation, "position", format!("{number} exceeds 32 bits")))
}

impl<R: Runtime> Gpu<R> {
    /// Whether the device has graphs.
    pub(crate) fn can_record(&self) -> bool {
        self.name() == "cuda"
    }

    /// The cache row `start` in device memory.
    pub(crate) fn start_word(&self, operation: &'static str, start: usize) -> Result<Buffer> {
        match *lock(&self.steps.position) {
            None => self.kept_words(operation, &[start]),
            Some(position) if start == position => Ok(self.steps.words[0].clone()),
            Some(position) => {
                let reason = format!("is {start} in the step of position {position}");
                Err(OpError::value(operation, "start", reason))
            }
        }
    }

    /// The numbers of keys in device memory.
    pub(crate) fn length_words(&self, operation: &'static str, lengths: &[usize]) -> Result<Buffer> {
        match *lock(&self.steps.position) {
            None => self.kept_words(operation, lengths),
            Some(position) if lengths == [position + 1] => Ok(self.steps.words[1].clone()),
            Some(position) => {
                let reason = format!("is {lengths:?} in the step of position {position}");
                Err(OpError::value(operation, "kv_len", reason))
            }
        }
    }

    fn kept_words(&self, operation: &'static str, numbers: &[usize]) -> Result<Buffer> {
        let words = numbers.iter().map(|&n| word(operation, n)).collect::<Result<Vec<u32>>>()?;
        let mut kept = lock(&self.steps.kept);
        if let Some(at) = kept.iter().position(|(kept, _)| *kept == words) {
            kept[at..].rotate_left(1);
        } else {
            if kept.len() == KEPT {
                kept.remove(0);
            }
            let buffer = self.create_u32(operation, &words)?;
            kept.push((words, buffer));
        }
        kept.last().map(|(_, buffer)| buffer.clone()).ok_or_else(|| unreachable!("one was found or added"))
    }

    /// [`Device::run_step`].
    pub(crate) fn step<E: From<OpError>>(
        &self,
        position: usize,
        recording: &mut Option<Recording<R>>,
        mut step: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        const OP: &str = "step";
        let keys = position.saturating_add(1);
        for (buffer, number) in self.steps.words.iter().zip([position, keys]) {
            self.write(buffer, bytemuck::bytes_of(&word(OP, number)?));
        }
        let _scope = self.steps.enter(position);
        // The profiler waits between operations.
        let records = self.steps.graphs.load(Ordering::Relaxed) && !self.profiler().is_some_and(|p| p.is_recording());
        if !records {
            return step();
        }
        if let Some(recording) = recording.as_ref().filter(|recording| recording.keys == planned_keys(keys)) {
            // SAFETY: the caller gives the recording of a step on the same tensors, which are alive; all work of a device
            // that records goes to one stream.
            unsafe { recording.graph.replay() };
            self.counters().replayed(recording.launches);
            return Ok(());
        }
        *recording = None;
        *recording = Some(self.record(planned_keys(keys), &mut step)?);
        Ok(())
    }

    /// Runs the step, which compiles its kernels and takes its memory, then records it.
    fn record<E: From<OpError>>(
        &self,
        keys: usize,
        step: &mut impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Recording<R>, E> {
        const OP: &str = "step";
        let client = self.uncounted();
        let failure = |error| device_error(OP, &error);
        let mut reason = None;
        for _ in 0..ATTEMPTS {
            client.graph_prepare().map_err(failure)?;
            let run = step().and_then(|()| self.synchronize().map_err(E::from));
            client.start_capture().map_err(failure)?;
            let before = self.counters().totals().launches;
            self.steps.set_recording(true);
            let recorded = run.and_then(|()| step());
            self.steps.set_recording(false);
            let graph = client.stop_capture();
            let launches = self.counters().take_back(before);
            recorded?;
            match graph {
                Ok(graph) => return Ok(Recording { graph, keys, launches }),
                // The record would have taken memory of its own: the next attempt finds more of it at hand.
                Err(error) => reason = Some(failure(error)),
            }
        }
        Err(E::from(reason.unwrap_or_else(|| unreachable!("there was an attempt"))))
    }
}

#[cfg(test)]
mod tests {
    use super::planned_keys;

    #[test]
    fn shapes_change_when_the_keys_double() {
        assert_eq!([1, 2, 3, 128, 129, 256].map(planned_keys), [1, 2, 4, 128, 256, 256]);
    }
}
