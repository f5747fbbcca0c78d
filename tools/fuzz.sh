#!/usr/bin/env bash
# Fuzzes every parser of files for SECONDS each (default 300), starting from the committed seeds. Needs cargo-fuzz, which
# it installs; the sanitizer's compiler flags are asked of the stable toolchain.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds="${1:-300}"

cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked
export RUSTC_BOOTSTRAP=1
for target in $(cargo fuzz list); do
    mkdir -p "target/fuzz/corpus/$target"
    echo "fuzzing $target for $seconds seconds"
    # Memory beyond 2 GiB or more than 10 seconds for one input fails, as a panic does.
    cargo fuzz run --target-dir target/fuzz/build "$target" "target/fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10 -max_len=65536 -print_final_stats=1
done
