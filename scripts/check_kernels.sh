#!/usr/bin/env bash
# Builds the compiled kernels without Python and compares them with plain loops, on this machine or another one:
#   scripts/check_kernels.sh [set] [quick]
#   CXX=aarch64-linux-gnu-g++ RUN=qemu-aarch64-static scripts/check_kernels.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CXX=${CXX:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-std=c++17 -O2 -fno-math-errno -Wall -Wno-psabi -Wno-maybe-uninitialized)  # GCC warns of its own headers

kernels() {
  local isa=$1 file
  shift
  for file in attend prefill encode; do
    "$CXX" "${flags[@]}" -O3 "$@" -DISA="$isa" -c "kvloom/kernels/native/$file.cpp" -o "$build/$isa-$file.o"
  done
}

kernels portable
if [[ $("$CXX" -dumpmachine) == x86_64* ]]; then
  kernels avx2 -mavx2 -mfma -mf16c
  kernels avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
fi
"$CXX" "${flags[@]}" -static tests/native/check.cpp "$build"/*.o -o "${OUT:-$build/check}"
${RUN:-} "${OUT:-$build/check}" "$@"
