#!/usr/bin/env bash
# The whole test suite: formatting, lints, every test, the unsafe code under AddressSanitizer. Needs only a Rust toolchain
# with rustfmt and clippy; as root on Debian it installs a cross compiler and an emulator for the NEON code, and a
# software Vulkan device and clang for the GPU code.
set -euo pipefail
cd "$(dirname "$0")"

cargo fmt --all --check
cargo clippy --workspace --all-targets --locked -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --exclude marlin-cli --no-deps --locked --quiet
tools/vulkan.sh
cargo test --workspace --release --locked
# The binary of the tests: a build of the command alone has other features of its dependencies.
marlin="${CARGO_TARGET_DIR:-target}/release/marlin"
if grep -q '^vulkan' <<<"$("$marlin" devices)"; then
    "$marlin" verify --device vulkan
else
    echo "SKIPPED: the kernel audit on Vulkan, because there is no Vulkan device"
fi
tools/address_sanitizer.sh
tools/aarch64.sh
