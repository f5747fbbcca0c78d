#!/usr/bin/env bash
# Tests the crates that contain unsafe code (SIMD, thread pool, memory maps) under AddressSanitizer. Its runtime comes with
# the ordinary toolchain for Linux and macOS; only the switch is unstable, hence RUSTC_BOOTSTRAP.
set -euo pipefail
cd "$(dirname "$0")/.."

host="$(rustc -vV | sed -n 's/^host: //p')"
runtime="$(rustc --print sysroot)/lib/rustlib/$host/lib"
if ! compgen -G "$runtime/librustc*_rt.asan.*" >/dev/null; then
    echo "SKIPPED: AddressSanitizer tests, because the toolchain has no runtime for $host"
    exit 0
fi
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/asan"
cargo test --locked --release --target "$host" -p marlin-cpu -p marlin-models --lib --tests
cargo test --locked --release --target "$host" -p marlin-quantize --lib
