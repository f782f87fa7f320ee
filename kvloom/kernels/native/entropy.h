// Entropy coding of bytes: `kvloom/kernels/entropy.py` says what the code is and gives the same bytes. Needs no instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvloom {

// A matrix of bytes: byte (r, c) is data[(r * cols + c) * step].
struct Matrix8 {
    uint8_t *data;
    int64_t rows, cols, step;
};

// The code of a matrix that has rows and columns; the decoder's side is told the shape.
std::vector<uint8_t> entropy_encode(const Matrix8 &m);

struct Coded {
    const uint8_t *data;
    size_t size;
    Matrix8 out;
};

// Fills every `out`. False if a code is none, or of another shape; nothing outside code and `out` is touched either way.
bool entropy_decode(const std::vector<Coded> &codes, int threads);

}  // namespace kvloom
