use marlin_models::{Checkpoint, ModelError};

use super::*;

fn open(file: &[u8]) -> Result<Checkpoint, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model.safetensors", file);
    Checkpoint::open(dir.path())
}

#[track_caller]
fn refused(file: &[u8], parts: &[&str]) -> ModelError {
    let error = open(file).unwrap_err();
    assert_names(&error.to_string(), &["model.safetensors"]);
    assert_names(&error.to_string(), parts);
    error
}

fn entry(shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn a_good_file_opens() {
    let checkpoint = open(&f32_file(&[("a", &[2], &[1.0, 2.0]), ("b", &[1], &[3.0])])).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.total_bytes(), 12);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32().unwrap(), [3.0]);
    assert_eq!(checkpoint.unused().map(|(n, _)| n).collect::<Vec<_>>(), ["a"]);
    let info = checkpoint.get("a").unwrap();
    assert_eq!((info.shape, info.bytes), (&[2][..], 8));
    // Released pages come back from the file.
    checkpoint.release("b").unwrap();
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32().unwrap(), [3.0]);
}

#[test]
fn empty_tensors_and_metadata_are_part_of_the_format() {
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"e":{},"a":{}}}   "#,
        entry("[0,7]", "[0,0]"),
        entry("[]", "[0,4]")
    );
    let checkpoint = open(&safetensors(&header, &2.5f32.to_le_bytes())).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().to_f32().unwrap(), [2.5]);
    assert_eq!(checkpoint.tensor("e").unwrap().elements(), 0);
}

#[test]
fn truncated_at_every_length() {
    let file = f32_file(&[("a", &[2], &[1.0, 2.0]), ("b", &[1], &[3.0])]);
    for len in 0..file.len() {
        let error = refused(&file[..len], &["truncated", &format!("{len} bytes")]);
        assert!(matches!(error, ModelError::Truncated { found, .. } if found == len as u64));
    }
    let longer = [&file[..], &[0]].concat();
    refused(&longer, &["1 bytes after the last tensor"]);
}

#[test]
fn flipped_header_bits_never_pass_unnoticed_or_panic() {
    let file = f32_file(&[("first", &[2], &[1.0, 2.0]), ("second", &[1], &[3.0])]);
    let good = open(&file).unwrap();
    let names: Vec<String> = good.names().map(str::to_owned).collect();
    let header = file.len() - 12;
    let mut refusals = 0;
    for bit in 0..header * 8 {
        let mut flipped = file.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match open(&flipped) {
            Err(error) => {
                assert_names(&error.to_string(), &["model.safetensors"]);
                refusals += 1;
            }
            // What remains valid is another name, or the same bytes in another type or shape: the model then misses
            // a tensor or finds its shape or dtype wrong.
            Ok(checkpoint) => {
                let same = names.iter().all(|name| {
                    let info = |c: &Checkpoint| c.get(name).map(|i| (i.dtype, i.shape.to_vec()));
                    info(&checkpoint) == info(&good)
                });
                assert!(!same, "bit {bit} changed nothing");
            }
        }
    }
    assert!(refusals > header * 8 / 2, "{refusals} of {}", header * 8);
}

#[test]
fn huge_header_lengths_allocate_nothing() {
    for length in [1u64 << 60, u64::MAX, u64::MAX - 7, 100_000_001] {
        let file = [&length.to_le_bytes()[..], b"{}"].concat();
        let error = refused(&file, &["header length", &length.to_string()]);
        assert!(matches!(error, ModelError::Header { .. }));
    }
    let file = [&99_000_000u64.to_le_bytes()[..], b"{}"].concat();
    assert!(matches!(refused(&file, &["99000008"]), ModelError::Truncated { .. }));
}

#[test]
fn overflowing_shapes() {
    for shape in [
        "[4294967296,4294967296]",
        "[18446744073709551615,2]",
        "[9223372036854775807,1,1]",
        "[2,2,2,2,4611686018427387904]",
    ] {
        let header = format!(r#"{{"w":{}}}"#, entry(shape, "[0,8]"));
        refused(&safetensors(&header, &[0; 8]), &["`w`", "overflows"]);
    }
    // Negative, fractional and beyond u64.
    for shape in ["[-1,2]", "[1.5]", "[18446744073709551616]"] {
        let header = format!(r#"{{"w":{}}}"#, entry(shape, "[0,8]"));
        refused(&safetensors(&header, &[0; 8]), &["not a tensor table"]);
    }
}

#[test]
fn offsets_that_contradict_shape_file_or_each_other() {
    let one = |shape: &str, offsets: &str| format!(r#"{{"w":{}}}"#, entry(shape, offsets));
    for offsets in ["[0,4]", "[8,0]", "[0,12]", "[18446744073709551608,18446744073709551615]"] {
        refused(&safetensors(&one("[2]", offsets), &[0; 8]), &["`w`", "data_offsets"]);
    }
    let past = safetensors(&one("[2]", "[0,8]"), &[0; 7]);
    assert!(matches!(refused(&past, &["truncated"]), ModelError::Truncated { .. }));
    let end = safetensors(&one("[2]", "[18446744073709551600,18446744073709551608]"), &[0; 8]);
    refused(&end, &["`w`", "overflow"]);
    let two = |b: &str| format!(r#"{{"a":{},"b":{}}}"#, entry("[2]", "[0,8]"), entry("[2]", b));
    refused(&safetensors(&two("[4,12]"), &[0; 12]), &["`b`", "overlaps"]);
    refused(&safetensors(&two("[0,8]"), &[0; 8]), &["overlaps"]);
    refused(&safetensors(&two("[12,20]"), &[0; 20]), &["`b`", "hole"]);
}

#[test]
fn malformed_tables() {
    for (header, parts) in [
        ("", &["not a tensor table"][..]),
        ("[]", &["not a tensor table"]),
        ("{\"a\":1}", &["not a tensor table"]),
        ("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", &["data_offsets"]),
        ("{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", &["`a`", "F99"]),
        (
            "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},\
             \"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
            &["`a`", "twice"],
        ),
        ("\u{0}\u{1}\u{2}", &["not a tensor table"]),
    ] {
        refused(&safetensors(header, &[]), parts);
    }
    let deep = "[".repeat(100_000);
    refused(&safetensors(&deep, &[]), &["not a tensor table"]);
    let not_utf8 = [&8u64.to_le_bytes()[..], &[b'{', b'"', 0xFF, 0xFE, b'"', b':', b'1', b'}']].concat();
    refused(&not_utf8, &["not a tensor table"]);
}

#[test]
fn rank_above_four_is_named_when_read() {
    let header = format!(r#"{{"w":{}}}"#, entry("[1,1,1,1,1]", "[0,4]"));
    let checkpoint = open(&safetensors(&header, &[0; 4])).unwrap();
    let error = checkpoint.tensor("w").unwrap_err().to_string();
    assert_names(&error, &["model.safetensors", "`w`", "4 dimensions"]);
}

#[test]
fn a_folder_without_weights() {
    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert_names(&error, &["model.safetensors: not found", "model.safetensors.index.json"]);
}

/// A folder with two shards of one tensor each and the given index.
fn sharded(index: Value) -> Result<Checkpoint, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "one.safetensors", &f32_file(&[("a", &[1], &[1.0])]));
    write(dir.path(), "two.safetensors", &f32_file(&[("b", &[1], &[2.0])]));
    write(dir.path(), "both.safetensors", &f32_file(&[("a", &[1], &[1.0]), ("b", &[1], &[2.0])]));
    write(dir.path(), "model.safetensors.index.json", index.to_string().as_bytes());
    Checkpoint::open(dir.path())
}

#[test]
fn indexes() {
    let good = sharded(json!({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})).unwrap();
    assert_eq!(good.names().count(), 2);
    let refused = |index: Value, parts: &[&str]| {
        assert_names(&sharded(index).unwrap_err().to_string(), parts);
    };
    let index = "model.safetensors.index.json";
    refused(json!({"weight_map": {"a": "three.safetensors"}}), &["three.safetensors", "not found", index]);
    refused(json!({"weight_map": {"b": "one.safetensors"}}), &["one.safetensors", "`b`", "missing"]);
    refused(
        json!({"weight_map": {"a": "one.safetensors", "b": "both.safetensors"}}),
        &["both.safetensors", "one.safetensors", "`a`"],
    );
    for escape in ["../one.safetensors", "/etc/passwd", "..", "", "x/../one.safetensors", "x\\one.safetensors"] {
        refused(json!({"weight_map": {"a": escape}}), &[index, "weight_map.a"]);
    }
    refused(json!({"weight_map": {"a": 3}}), &[index, "weight_map.a"]);
    refused(json!({"weight_map": []}), &[index, "`weight_map`"]);
    refused(json!({}), &[index, "`weight_map`"]);
    refused(json!(3), &[index, "`weight_map`"]);
    // A tensor that the index does not list is there, and reported as extra if nothing reads it.
    let checkpoint = sharded(json!({"weight_map": {"a": "both.safetensors"}})).unwrap();
    checkpoint.tensor("a").unwrap();
    let error = checkpoint.check_all_used(|_| false).unwrap_err();
    assert_names(&error.to_string(), &["both.safetensors", "`b`"]);
    checkpoint.check_all_used(|name| name == "b").unwrap();
}
