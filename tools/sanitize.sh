#!/usr/bin/env bash
# Runs the tests, or those that pytest's arguments name, with a native core built with sanitizers:
# tools/sanitize.sh address,undefined|thread [pytest arguments]
set -euo pipefail
list=${1:?usage: tools/sanitize.sh LIST [pytest arguments]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/venv"
CXX=g++ "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check \
    --config-settings=cmake.define.BUNDLEFMT_SANITIZE="$list" "$root[test]"

# The interpreter has no sanitizer in it, so the runtime comes first, and with it libstdc++, whose
# exceptions it looks up when it starts. CPython frees little at exit.
case $list in
*thread*) runtime=libtsan.so ;;
*address*) runtime=libasan.so ;;
*) runtime=libubsan.so ;;
esac
export ASAN_OPTIONS=detect_leaks=0
export TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1
preload="LD_PRELOAD=$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so.6)"

# Without a compiler, or where the build fails, the install is pure Python.
(cd "$scratch" && env "$preload" venv/bin/bundlefmt doctor --json) | grep '"name": "native"'
cd "$root"
env "$preload" "$scratch/venv/bin/pytest" -rs "$@"
