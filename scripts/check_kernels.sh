#!/usr/bin/env bash
# Builds the compiled kernels without Python and compares them with plain loops, on this machine or another one:
#   scripts/check_kernels.sh [set or all] [quick]
#   PORTABLE=-DPLAIN scripts/check_kernels.sh portable     # as compilers build it that have no vector types
#   CXX=aarch64-linux-gnu-g++ RUN=qemu-aarch64-static scripts/check_kernels.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CXX=${CXX:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-std=c++17 -O2 -fno-math-errno -Wall -Wno-psabi -Wno-maybe-uninitialized)  # GCC warns of its own headers

kernels() {
  local isa=$1 files=$2 file
  shift 2
  for file in $files; do
    "$CXX" "${flags[@]}" -O3 "$@" -DISA="$isa" -c "kvloom/kernels/native/$file.cpp" -o "$build/$isa-$file.o"
  done
}

all="attend prefill encode"
kernels portable "$all" ${PORTABLE:-}
if [[ $("$CXX" -dumpmachine) == x86_64* ]]; then
  kernels avx2 "$all" -mavx2 -mfma -mf16c
  avx512=(-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  kernels avx512 "$all" "${avx512[@]}"
  kernels avx512vnni attend "${avx512[@]}" -mavx512vnni
  kernels avx512bf16 "attend prefill" "${avx512[@]}" -mavx512vnni -mavx512bf16
  # Their algorithms for machines without those instructions.
  kernels emulated "$all" -mavx2 -mfma -mf16c -DEMULATED
fi
"$CXX" "${flags[@]}" -static tests/native/check.cpp "$build"/*.o -o "${OUT:-$build/check}"
${RUN:-} "${OUT:-$build/check}" "$@"
