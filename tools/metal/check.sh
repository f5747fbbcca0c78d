#!/usr/bin/env bash
# Parses every Metal kernel of a folder with clang and the declarations beside this file:
#     tools/metal/check.sh DIR
# First the declarations are tried themselves: right statements must parse, wrong ones must not. clang comes from Debian's
# package, which root installs here when it is missing; where that is not possible the kernels are skipped, and counted.
set -euo pipefail
[ $# = 1 ] && [ -d "$1" ] || {
    echo "usage: $0 DIR" >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
count=$(find "$folder" -maxdepth 1 -name '*.metal' | wc -l)
[ "$count" -gt 0 ] || {
    echo "no kernel in $folder" >&2
    exit 2
}

skip() {
    echo "SKIPPED: $count Metal kernels were not parsed, because $1"
    exit 0
}

if ! command -v clang++ >/dev/null; then
    command -v apt-get >/dev/null || skip "there is no clang++"
    [ "$(id -u)" = 0 ] || skip "there is no clang++, and only root can install it"
    echo "Metal: installing clang"
    (
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -qq install -y --no-install-recommends clang
    ) >/dev/null || skip "clang could not be installed"
fi

# OpenCL C++ is the language of clang's that is nearest to Metal's. Literals are float, as there.
parse() {
    clang++ -x cl -cl-std=clc++2021 -cl-no-stdinc -cl-single-precision-constant --target=spir64 -fsyntax-only \
        -Wno-unknown-attributes -I "$here" "$@"
}
parse /dev/null 2>/dev/null || skip "$(clang++ --version | head -1) has no OpenCL C++ of 2021"

statement() {
    parse - <<END
#include <metal_stdlib>
using namespace metal;
struct alignas(16) uint_4 { uint i_0; uint i_1; uint i_2; uint i_3; };
struct info_st { float scalars_float[2]; uint scalars_uint[2]; };
[[kernel]]
void statement(
    device float *f [[buffer(0)]], device half *h [[buffer(1)]], device uint *u [[buffer(2)]],
    const device float *in [[buffer(3)]], device atomic_uint *a [[buffer(4)]], device atomic_float *af [[buffer(5)]],
    constant info_st &info [[buffer(6)]]
) {
    threadgroup uchar memory[1024];
    threadgroup float *tf = reinterpret_cast<threadgroup float *>(&memory[0]);
    threadgroup atomic_uint *ta = reinterpret_cast<threadgroup atomic_uint *>(&memory[512]);
    float x = in[0]; uint i = u[0]; int s = 0; half y = h[0]; ulong l = 0;
    simdgroup_half8x8 ma; simdgroup_float8x8 mc;
    $1
}
END
}

statements=0
while read -r verdict code; do
    case "$verdict" in
    ok) statement "$code" || { echo "the declarations refuse: $code" >&2; exit 1; } ;;
    no) if statement "$code" 2>/dev/null; then echo "the declarations accept: $code" >&2; exit 1; fi ;;
    *) continue ;;
    esac
    statements=$((statements + 1))
done <"$here/shim_test.txt"

export here
export -f parse
refused=$(find "$folder" -maxdepth 1 -name '*.metal' -print0 | sort -z |
    xargs -0 -n 1 -P "$(getconf _NPROCESSORS_ONLN)" bash -c 'parse "$0" >"$0.log" 2>&1 && rm "$0.log" || echo "$0"')
if [ -n "$refused" ]; then
    for kernel in $refused; do
        grep -m 3 -A 2 -E 'error:' "$kernel.log" || head -5 "$kernel.log"
    done >&2
    echo "Metal: clang refuses $(wc -w <<<"$refused") of $count kernels; $statements statements on the declarations passed" >&2
    exit 1
fi
echo "Metal: clang parsed $count kernels; $statements statements on the declarations passed"
