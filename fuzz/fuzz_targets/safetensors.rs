//! A safetensors file: its header, then every tensor by each way of reading one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use marlin_models::Checkpoint;

fuzz_target!(|file: &[u8]| {
    let mut stored = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut stored, file).expect("room for it");
    let Ok(checkpoint) = Checkpoint::open_file(stored.path()) else { return };
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    for name in names {
        let shape = checkpoint.get(&name).expect("a listed tensor").shape.to_vec();
        if let Ok(tensor) = checkpoint.tensor(&name) {
            assert!(tensor.bytes().len() <= file.len());
            let _ = tensor.to_f32();
            let _ = tensor.to_u32();
        }
        let _ = checkpoint.dense(&name, &shape);
        let _ = checkpoint.release(&name);
    }
});
