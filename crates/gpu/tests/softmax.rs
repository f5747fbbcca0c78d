//! Softmax of rows on the Vulkan device of this machine, software or not. Without one a line `SKIPPED` is printed.
#![cfg(feature = "vulkan")]

use std::io::Write;

use marlin_formats::DType;
use marlin_ops::{Device, HostTensor, Result};

/// The softmax of a tensor, or nothing without a device.
fn softmax(dims: &[usize], values: &[f32]) -> Option<Result<Vec<f32>>> {
    let gpu = match marlin_gpu::vulkan(None) {
        Ok(gpu) => gpu,
        Err(error) => {
            // Past the capture of the test harness, which hides what passing tests print.
            let line = format!("SKIPPED: softmax on Vulkan, because {error}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return None;
        }
    };
    let x = gpu.upload(&HostTensor::from_f32(dims, values).unwrap()).unwrap();
    let mut out = gpu.zeros(DType::F32, dims).unwrap();
    gpu.softmax(&x, &mut out).unwrap();
    Some(gpu.read_f32(&out))
}

#[test]
fn one_of_one_is_certain() {
    let Some(found) = softmax(&[2, 1], &[-3.5, 1e4]) else { return };
    assert_eq!(found.unwrap(), [1.0, 1.0]);
}

#[test]
fn banned_ids_have_no_share() {
    let Some(found) = softmax(&[1, 3], &[f32::NEG_INFINITY, 2.0, 2.0]) else { return };
    assert_eq!(found.unwrap(), [0.0, 0.5, 0.5]);
}

#[test]
fn bad_rows_are_errors_of_the_next_read() {
    let rows = [[1.0, f32::NAN, 2.0], [1.0, 2.0, f32::INFINITY], [f32::NEG_INFINITY; 3]];
    for (row, part) in rows.iter().zip(["element 1", "element 2", "row 0 holds only -inf"]) {
        let Some(found) = softmax(&[1, 3], row) else { return };
        let error = found.unwrap_err().to_string();
        assert!(error.contains("softmax") && error.contains(part), "{error}");
    }
}
