//! Jobs that are interrupted and taken up again end with the same parts.

mod common;

use common::chain::{METHODS, Memory, Source, SourceResult, files, fingerprint, fixture, targets};
use marlin_quantize::{Event, Method, Part, PartStore, QuantizeError, Settings, Staging, Summary, quantize_model};

/// Parts of a whole run of each method: what is outside the layers and two layers; or two layers, the head and the
/// embeddings.
const PARTS: [usize; 4] = [3, 4, 4, 3];

fn run(method: Method, store: &mut dyn PartStore) -> Result<Summary, QuantizeError> {
    let mut fixture = fixture();
    let assignments = targets(method, &fixture.assignments);
    let settings = Settings { assignments: &assignments, method, folds: &[], search: None };
    let source = Source(fixture.weights.clone());
    quantize_model(settings, &source, Some(&mut fixture.chain), store, &|_| {})
}

fn whole(method: Method) -> (Memory, Summary) {
    let mut memory = Memory::default();
    let summary = run(method, &mut memory).unwrap();
    assert_eq!((memory.parts.len(), summary.restored), (summary.parts, 0));
    (memory, summary)
}

/// Fails at one part, before or after it was stored.
struct Faulty<'a> {
    staging: &'a mut Staging,
    at: usize,
    after: bool,
}

impl PartStore for Faulty<'_> {
    fn contains(&self, index: usize) -> bool {
        self.staging.contains(index)
    }

    fn load(&mut self, index: usize) -> SourceResult<Part> {
        self.staging.load(index)
    }

    fn store(&mut self, index: usize, part: &Part) -> SourceResult<()> {
        if index == self.at && !self.after {
            return Err("pulled the plug".into());
        }
        self.staging.store(index, part)?;
        if index == self.at { Err("pulled the plug".into()) } else { Ok(()) }
    }
}

#[test]
fn a_fault_at_any_part_changes_nothing_in_the_end() {
    for (method, parts) in METHODS.into_iter().zip(PARTS) {
        let (expected, summary) = whole(method);
        assert_eq!(summary.parts, parts);
        let root = tempfile::tempdir().unwrap();
        let uninterrupted = root.path().join("whole.partial");
        run(method, &mut Staging::open(&uninterrupted, &fingerprint(method)).unwrap()).unwrap();
        for (at, after) in (0..parts).flat_map(|at| [(at, false), (at, true)]) {
            if matches!(method, Method::Exl3(_)) && (at, after) != (1, false) {
                continue;
            }
            let dir = root.path().join(format!("{at}-{after}.partial"));
            let mut staging = Staging::open(&dir, &fingerprint(method)).unwrap();
            let error = run(method, &mut Faulty { staging: &mut staging, at, after }).unwrap_err();
            assert_eq!(error.to_string(), "pulled the plug");
            drop(staging);
            let mut staging = Staging::open(&dir, &fingerprint(method)).unwrap();
            let resumed = run(method, &mut staging).unwrap();
            let restored = at + usize::from(after);
            assert_eq!(resumed, Summary { restored, ..summary.clone() }, "{method:?}, part {at}");
            let parts: Vec<Part> = (0..parts).map(|index| staging.load(index).unwrap()).collect();
            assert_eq!(parts, expected.parts);
            assert_eq!(files(&dir), files(&uninterrupted));
        }
    }
}

#[test]
fn finished_layers_are_not_quantized_again_and_feed_the_next() {
    let method = METHODS[1];
    let (expected, _) = whole(method);
    for done in 0..=PARTS[1] {
        let mut memory = Memory { parts: expected.parts[..done].to_vec(), full_after: None };
        let mut fixture = fixture();
        // The weights of finished modules are gone: reading one would fail.
        let mut source = Source(fixture.weights.clone());
        for (name, _) in memory.parts.iter().flat_map(|part| &part.weights) {
            source.0.remove(name);
        }
        let settings = Settings { assignments: &fixture.assignments, method, folds: &[], search: None };
        let restored = std::sync::Mutex::new(0);
        let progress = |event: Event<'_>| {
            if let Event::Restored { weights } = event {
                *restored.lock().unwrap() += weights;
            }
        };
        quantize_model(settings, &source, Some(&mut fixture.chain), &mut memory, &progress).unwrap();
        assert_eq!(memory.parts, expected.parts);
        // The two layers run again only while a calibrated part is missing.
        assert_eq!(fixture.chain.loaded.len(), if done < 3 { 2 } else { 0 });
        let weights: usize = expected.parts[..done].iter().map(|part| part.weights.len() * 64 * 64).sum();
        assert_eq!(*restored.lock().unwrap(), weights as u64);
    }
}

#[test]
fn parts_of_another_model_are_refused() {
    let method = METHODS[1];
    let (expected, _) = whole(method);
    let refused = |change: &dyn Fn(&mut Memory), reason: &str| {
        let mut memory = expected.clone();
        change(&mut memory);
        let error = run(method, &mut memory).unwrap_err();
        assert!(matches!(error, QuantizeError::StoredPart { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    };
    refused(&|memory| memory.parts.swap(0, 1), "`model.layers.0.q_proj` is missing");
    refused(&|memory| memory.parts[2].weights.clear(), "0 modules, expected 1");
    refused(
        &|memory| {
            let (_, int3) = memory.parts[0].weights[0].clone();
            memory.parts[2].weights[0].1 = int3;
        },
        "`lm_head` has another shape or format",
    );
}
