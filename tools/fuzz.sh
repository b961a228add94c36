#!/usr/bin/env bash
# Fuzzes the native core for SECONDS, shared by its instruction sets; fails on a finding, whose
# input it names.
set -euo pipefail
seconds=${1:?usage: tools/fuzz.sh SECONDS}
source=$(cd "$(dirname "$0")/.." && pwd)/bundlefmt/native
scratch=$(mktemp -d)
trap 'rm -rf "$scratch/build" "$scratch/corpus"; rmdir --ignore-fail-on-non-empty "$scratch"' EXIT

cmake -S "$source" -B "$scratch/build" -DCMAKE_CXX_COMPILER=clang++ -DBUNDLEFMT_FUZZ=ON >/dev/null
cmake --build "$scratch/build" --parallel >/dev/null
mkdir "$scratch/corpus"
for simd in portable avx2 avx512; do
    BUNDLEFMT_SIMD=$simd "$scratch/build/fuzz" "$scratch/corpus" -max_len=1024 \
        -max_total_time=$((seconds / 3)) -detect_leaks=0 -artifact_prefix="$scratch/$simd-" \
        -verbosity=0 -print_funcs=0 -print_final_stats=1
done
