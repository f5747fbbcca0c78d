#!/usr/bin/env bash
# Type-checks the binary `marlin`, with the Metal device, for macOS on a Debian machine, as far as that goes without Apple's
# SDK:
#     tools/metal/macos.sh [CARGO ARGUMENT...]
# The standard library of aarch64-apple-darwin is built from Debian's source package of the compiler that
# tools/aarch64.sh unpacks, so that script must have run. C code inside dependencies is not compiled, nothing is linked.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
    echo "SKIPPED: type check for macOS, because $1"
    exit 0
}

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
rust=$target/aarch64/rust
checked=$target/macos
mkdir -p "$checked"
[ -x "$rust/usr/bin/rustc" ] || skip "tools/aarch64.sh has not unpacked Debian's compiler"
export LD_LIBRARY_PATH=$rust/usr/lib/x86_64-linux-gnu
export RUSTC=$rust/usr/bin/rustc

# The sources must be of the compiler's own version.
version=$("$RUSTC" --version | cut -d ' ' -f 2)
source=$rust/usr/lib/rustlib/src/rust/library
if ! [ -e "$source" ]; then
    package=$(apt-cache madison rust-web-src | awk -v v="$version" 'index($3, v "+") == 1 && !found++ { print $3 }')
    [ -n "$package" ] || skip "there is no rust-web-src of version $version"
    rm -rf "$checked/source" "$checked"/rust-web-src_*.deb
    mkdir -p "$checked/source" "$(dirname "$source")"
    (cd "$checked" && apt-get -o APT::Sandbox::User=root -qq download "rust-web-src=$package") ||
        skip "rust-web-src could not be downloaded"
    dpkg-deb -x "$checked"/rust-web-src_*.deb "$checked/source"
    rm "$checked"/rust-web-src_*.deb
    ln -s "$checked/source/usr/src/rustc-$version/library" "$source"
fi

# Stands for Apple's C compiler and archiver: makes the files they are asked for, empty.
cat >"$checked/none" <<'END'
#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
    -o) shift; : >"$1" ;;
    *.a) : >"$1" ;;
    esac
    shift
done
END
chmod +x "$checked/none"

# Building the standard library is a feature of Cargo's that is not stable.
export RUSTC_BOOTSTRAP=1
export CC_aarch64_apple_darwin=$checked/none AR_aarch64_apple_darwin=$checked/none
export CARGO_TARGET_DIR=$checked
cargo check -Zbuild-std=std,panic_abort --target aarch64-apple-darwin --locked "${@:---package=marlin-cli}"
