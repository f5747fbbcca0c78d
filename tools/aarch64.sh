#!/usr/bin/env bash
# Proves the NEON code on an x86-64 machine: builds the CPU backend for aarch64-unknown-linux-gnu, lints it, and runs its
# tests, the conformance suite with NEON in both modes and the model parity tests under user-mode emulation.
#
# It needs Debian 12 or 13. The linker and the emulator are installed with apt, as root. The compiler is Debian's rustc-web
# with the aarch64 standard library of the same build (a standard library must match its compiler exactly); both are only
# unpacked, into target/aarch64/rust, so the system's Rust is not touched. Cargo is the caller's.
# On an aarch64 machine the ordinary tests run the same code, so there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "SKIPPED: NEON under emulation, because $1"
    exit 0
}

linker=aarch64-linux-gnu-gcc
emulator=qemu-aarch64

case "$(uname -sm)" in
"Linux x86_64") ;;
*aarch64 | *arm64)
    echo "NEON: the ordinary tests run it on this machine"
    exit 0
    ;;
*) skip "this is $(uname -sm), and Debian's cross compiler is for Linux on x86-64" ;;
esac
case "$(. /etc/os-release && echo "${ID-} ${VERSION_ID-}")" in
"debian 12" | "debian 13") ;;
*) skip "this is not Debian 12 or 13" ;;
esac

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/aarch64
rust=$target/rust

# Package lists of both architectures, apart from the system's: no foreign architecture is added there.
packages=$target/packages
apt_both=(
    -o APT::Architectures=amd64,arm64 -o APT::Sandbox::User=root
    -o Dir::State::Lists="$packages/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
)

install_tools() {
    echo "NEON: installing the compiler, the linker and the emulator"
    rm -rf "$packages" "$rust"
    mkdir -p "$packages/lists/partial"
    apt-get "${apt_both[@]}" -qq update
    local runtime
    runtime=$(apt-cache "${apt_both[@]}" depends libstd-rust-web-dev:amd64 | awk '$1 == "Depends:" && !found++ { print $2 }')
    (
        cd "$packages"
        apt-get "${apt_both[@]}" -qq download \
            rustc-web rust-web-clippy "$runtime" libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64
        for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    )
    local libraries
    libraries=$(dpkg-deb -f "$packages/$runtime"_*_amd64.deb Depends)
    DEBIAN_FRONTEND=noninteractive apt-get "${apt_both[@]}" -o DPkg::Lock::Timeout=120 -qq satisfy -y \
        --no-install-recommends "$libraries, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user" >/dev/null
    # Last: a complete folder is the sign that everything is there.
    mv "$packages/unpacked" "$rust"
    rm -rf "$packages"
}

if ! { [ -d "$rust" ] && command -v "$linker" && command -v "$emulator"; } >/dev/null; then
    [ "$(id -u)" = 0 ] || skip "only root can install gcc-aarch64-linux-gnu and qemu-user"
    install_tools
fi

export RUSTC=$rust/usr/bin/rustc
export LD_LIBRARY_PATH=$rust/usr/lib/x86_64-linux-gnu
export CARGO_TARGET_DIR=$target
export CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$emulator -cpu max -L /usr/aarch64-linux-gnu"
export CARGO_PROFILE_RELEASE_DEBUG=none

# Few lints, because those of this compiler may be newer than the caller's.
"$rust/usr/bin/cargo-clippy" clippy --release --locked --quiet -p marlin-cpu --all-targets -- \
    -A clippy::all -D clippy::undocumented_unsafe_blocks -D dead_code -D unused_unsafe

# With MARLIN_ISA=neon a processor without it is an error. Left out is what the native run proves as well: portable code,
# the oracle against the models, that fast is not exact, and the suite and the audit against themselves.
MARLIN_ISA=neon cargo test --release --locked -p marlin-cpu -p marlin-conformance -p marlin-models \
    --lib --test families --test linear --test cpu --test parity -- \
    --skip portable --skip oracle --skip without_simd --skip fast_is_not_exact --skip every_case_can_fail --skip audit::
