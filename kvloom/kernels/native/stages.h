// What is done to a tile of decoded slots, x [m, width] in rows `step` apart, of a run's slots from t on. See `Op`.
#pragma once

#include "keys.h"
#include "values.h"

namespace {

using namespace kvloom;

inline const uint8_t *row_of(const Field &f, int head, int64_t t) { return f.data + head * f.head + (f.per ? t / f.per : 0) * f.row; }

// The first numbers of a row, as fp32.
inline void read(Kind kind, const uint8_t *row, int count, float *out) {
    if (kind == EXPONENT) {  // 2 ** (e - 127)
        for (int i = 0; i < count; i++) {
            const uint32_t bits = uint32_t(row[i]) << 23;
            memcpy(out + i, &bits, 4);
        }
    } else {
        numbers(kind, row, 0, count, out);
    }
}
inline float one(Kind kind, const uint8_t *at) {
    if (kind == FLOAT32) return scalar(reinterpret_cast<const F32 *>(at));
    if (kind == FLOAT16) return scalar(reinterpret_cast<const F16 *>(at));
    if (kind == BFLOAT16) return scalar(reinterpret_cast<const BF16 *>(at));
    float x;
    return read(kind, at, 1, &x), x;
}
inline int size_of(Kind kind) { return kind == FLOAT32 || kind == INT32 ? 4 : kind == EXPONENT ? 1 : 2; }
inline int64_t place(Kind kind, const uint8_t *row, int i) {
    if (kind == INT16) {
        int16_t x;
        return memcpy(&x, row + i * 2, 2), x;
    }
    int32_t x;
    return memcpy(&x, row + i * 4, 4), x;
}

// Numbers of the slots [t, t + m), one each.
inline void column(const Field &f, int head, int64_t t, int m, float *out) {
    const uint8_t *at = row_of(f, head, t);
    if (f.row == size_of(f.kind) && f.per == 1) return read(f.kind, at, m, out);
    for (int i = 0; i < m; i++) out[i] = one(f.kind, row_of(f, head, t + i));
}

inline void affine(const Stage &stage, int head, int64_t t, int m, int width, int step, float *x, float *room) {
    const Field &a = stage.a.data ? stage.a : stage.b;
    const int count = a.count, each = width / count;
    float *scale = room, *zero = room + count;
    for (int i = 0; i < count; i++) scale[i] = 1, zero[i] = 0;
    const auto together = [&](const Field &f) { return f.data && f.per == 1 && f.row == int64_t(count) * size_of(f.kind); };
    if (count < W && together(stage.a) && together(stage.b)) {  // few numbers at a time would take long to convert
        float *scales = room, *zeros = room + m * count;
        read(stage.a.kind, row_of(stage.a, head, t), m * count, scales), read(stage.b.kind, row_of(stage.b, head, t), m * count, zeros);
        for (int i = 0; i < m; i++)
            for (int g = 0; g < count; g++) {
                const float s = scales[i * count + g], z = zeros[i * count + g];
                float *row = x + i * step;
                int d = g * each;
                for (; d + W <= (g + 1) * each; d += W) store(row + d, load(row + d) * s + z);
                for (; d < (g + 1) * each; d++) row[d] = row[d] * s + z;
            }
        return;
    }
    for (int i = 0; i < m;) {  // slots that share their numbers
        const int64_t end = a.per ? ((t + i) / a.per + 1) * a.per - t : m;
        if (stage.a.data) read(stage.a.kind, row_of(stage.a, head, t + i), count, scale);
        if (stage.b.data) read(stage.b.kind, row_of(stage.b, head, t + i), count, zero);
        for (; i < m && i < end; i++) {
            float *row = x + i * step;
            if (each == 1) {
                int d = 0;
                for (; d + W <= width; d += W) store(row + d, load(row + d) * load(scale + d) + load(zero + d));
                for (; d < width; d++) row[d] = row[d] * scale[d] + zero[d];
            } else {
                for (int g = 0; g < count; g++) {
                    const float s = scale[g], z = zero[g];
                    int d = g * each;
                    for (; d + W <= (g + 1) * each; d += W) store(row + d, load(row + d) * s + z);
                    for (; d < (g + 1) * each; d++) row[d] = row[d] * s + z;
                }
            }
        }
    }
}

inline void permute(const Stage &stage, int head, int m, int width, int step, float *x, float *room) {
    const uint8_t *order = row_of(stage.a, head, 0);
    for (int i = 0; i < m; i++, x += step) {
        memcpy(room, x, width * sizeof(float));
        for (int d = 0; d < width; d++) x[d] = room[place(INT32, order, d)];
    }
}

inline void places(const Stage &stage, int head, int64_t t, int m, int width, int step, float *x) {
    const int k = stage.a.count, first = stage.x ? head * width : 0, size = size_of(stage.b.kind);
    for (int i = 0; i < m; i++, x += step) {
        const uint8_t *where = row_of(stage.a, head, t + i), *what = row_of(stage.b, head, t + i);
        for (int j = 0; j < k; j++) {
            const int64_t d = place(stage.a.kind, where, j) - first;
            if (d < 0 || d >= width) continue;
            const float number = one(stage.b.kind, what + j * size);
            x[d] = stage.y ? x[d] + number : number;
        }
    }
}

// How far each channel's places have been gone through, from slot `at` on.
struct Cursor {
    int64_t at = -1;
    int next[MAX_DIM];
};

inline void slots(const Stage &stage, int head, int64_t t, int m, int width, int step, float *x, Cursor &cursor) {
    const int k = stage.a.count / width, size = size_of(stage.b.kind), where_size = size_of(stage.a.kind);
    const int64_t per = stage.a.per;
    for (int64_t at = t; at < t + m;) {
        const int64_t begin = per ? at / per * per : 0, end = per && begin + per < t + m ? begin + per : t + m;
        const uint8_t *where = row_of(stage.a, head, at), *what = row_of(stage.b, head, at);
        for (int d = 0; d < width; d++) {
            const uint8_t *mine = where + int64_t(d) * where_size;
            int j = cursor.next[d];
            if (cursor.at != at || at == begin) {
                int low = 0, high = k;
                while (low < high) {
                    const int middle = (low + high) / 2;
                    if (place(stage.a.kind, mine, middle * width) < at - begin) low = middle + 1;
                    else high = middle;
                }
                j = low;
            }
            for (; j < k; j++) {
                const int64_t slot = begin + place(stage.a.kind, mine, j * width);
                if (slot >= end) break;
                x[(slot - t) * step + d] = one(stage.b.kind, what + (int64_t(j) * width + d) * size);
            }
            cursor.next[d] = j;
        }
        at = cursor.at = end;
    }
}

inline void product_of(const Stage &stage, int head, int64_t t, int m, int width, int step, float *x, float *room) {
    const int rank = stage.x;
    float *left = room, *right = left + rank, *rows = right + step * rank;
    for (int64_t at = t; at < t + m;) {
        const int64_t per = stage.b.per, end = per && (at / per + 1) * per < t + m ? (at / per + 1) * per : t + m;
        read(stage.b.kind, row_of(stage.b, head, at), width * rank, rows);
        for (int d = 0; d < width; d++)
            for (int j = 0; j < rank; j++) right[j * step + d] = rows[d * rank + j];
        for (; at < end; at++) {
            read(stage.a.kind, row_of(stage.a, head, at), rank, left);
            float *row = x + (at - t) * step;
            for (int j = 0; j < rank; j++)
                for (int d = 0; d < width; d += W) store(row + d, load(row + d) + load(right + j * step + d) * left[j]);
        }
    }
}

// y [R, V W] = x [R, width] times V W columns of a matrix, whose sums stay in registers.
template <int R, int V, class T>
inline void strip(const float *x, int step, const T *matrix, int wide, int width, float *y, int wide_step) {
    vf a[R], b[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) a[r] = b[r] = vf{};
    for (int i = 0; i < width; i++) {
        const vf u = load(matrix + int64_t(i) * wide), v = V > 1 ? load(matrix + int64_t(i) * wide + W) : u;
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf each = splat(x[r * step + i]);
            a[r] += each * u;
            if (V > 1) b[r] += each * v;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        store(y + r * wide_step, a[r]);
        if (V > 1) store(y + r * wide_step + W, b[r]);
    }
}
template <class T>
inline void times(const float *x, int m, int width, int step, const T *matrix, int wide, float *y, int wide_step) {
    const auto columns = [&](auto V, int d) {
        const auto rows = [&](auto R, int i) { strip<R.value, V.value>(x + i * step, step, matrix + d, wide, width, y + i * wide_step + d, wide_step); };
        int i = 0;
        for (; i + 6 <= m && i + 8 != m; i += 6) rows(std::integral_constant<int, 6>(), i);
        for (; i + 4 <= m; i += 4) rows(std::integral_constant<int, 4>(), i);
        for (; i < m; i++) rows(std::integral_constant<int, 1>(), i);
    };
    int d = 0;
    for (; d + 2 * W <= wide; d += 2 * W) columns(std::integral_constant<int, 2>(), d);
    for (; d + W <= wide; d += W) columns(std::integral_constant<int, 1>(), d);
    if (d < wide && wide >= W) columns(std::integral_constant<int, 1>(), wide - W), d = wide;
    for (; d < wide; d++)
        for (int i = 0; i < m; i++) {
            float found = 0;
            for (int j = 0; j < width; j++) found += x[i * step + j] * scalar(matrix + int64_t(j) * wide + d);
            y[i * wide_step + d] = found;
        }
    for (int i = 0; i < m; i++)
        for (d = wide; d < wide_step; d++) y[i * wide_step + d] = 0;
}

// y [m, wide] = x times a matrix [width, wide].
inline void expand(const Stage &stage, int head, int m, int width, int step, const float *x, float *y, int wide_step) {
    const int wide = stage.x;
    const uint8_t *matrix = row_of(stage.a, head, 0);
    if (stage.a.kind == FLOAT16) times(x, m, width, step, reinterpret_cast<const F16 *>(matrix), wide, y, wide_step);
    else if (stage.a.kind == BFLOAT16) times(x, m, width, step, reinterpret_cast<const BF16 *>(matrix), wide, y, wide_step);
    else times(x, m, width, step, reinterpret_cast<const F32 *>(matrix), wide, y, wide_step);
}

inline void unit(int m, int width, int step, float *x) {
    for (int i = 0; i < m; i++, x += step) {
        vf total = {};
        int d = 0;
        for (; d + W <= width; d += W) total += load(x + d) * load(x + d);
        float square = sum(total);
        for (; d < width; d++) square += x[d] * x[d];
        const float by = square > 0 ? 1 / std::sqrt(square) : 0;
        for (d = 0; d + W <= width; d += W) store(x + d, load(x + d) * by);
        for (; d < width; d++) x[d] *= by;
    }
}

// What rounding the product of a and b, which is `rounded`, took away.
inline vf lost(vf a, vf b, vf rounded) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)rounded);
#elif defined(__AVX2__)
    return (vf)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)rounded);
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = float(double(a[i]) * double(b[i]) - double(rounded[i]));
    return out;
#endif
}
inline void rounded(Kind to, int n, float *x) {
    if (to == BFLOAT16)
        for (int i = 0; i < n; i++) {
            const uint16_t y = to_bfloat16(x[i]);
            x[i] = scalar(reinterpret_cast<const BF16 *>(&y));
        }
    if (to == FLOAT16)
        for (int i = 0; i < n; i++) {
            const uint16_t y = to_float16(x[i]);
            x[i] = scalar(reinterpret_cast<const F16 *>(&y));
        }
}

// Models turn by angles that are rounded to fp32, far from 0 by much: so is this.
inline void turn(const Stage &stage, int head, int64_t t, int m, int step, float *x, float *room) {
    const int pairs = stage.y, P = stage.c.count;  // P: padded to whole vectors
    float *cosine = room, *sine = room + P;
    const float *speed = reinterpret_cast<const float *>(stage.c.data);
    for (int i = 0; i < m; i++, x += step) {
        const int64_t where = stage.d.data ? place(stage.d.kind, row_of(stage.d, head, t + i), 0) : stage.start + t + i;
        const float *far = reinterpret_cast<const float *>(stage.a.data + (where >> 6) * stage.a.row);
        const float *near = reinterpret_cast<const float *>(stage.b.data + (where & 63) * stage.b.row);
        const vf at = splat(float(where));
        for (int j = 0; j < P; j += W) {
            const vf c = load(far + j) * load(near + j) - load(far + P + j) * load(near + P + j);
            const vf s = load(far + P + j) * load(near + j) + load(far + j) * load(near + P + j);
            const vf by = load(speed + j), e = lost(at, by, at * by), half = e * e * 0.5f;
            store(cosine + j, c + e * s - half * c), store(sine + j, s - e * c - half * s);
        }
        if (stage.round != FLOAT32) rounded(stage.round, 2 * P, room);
        float *a = x + stage.x;
        if (stage.z) {
            for (int j = 0; j < pairs; j++) {
                const float u = a[2 * j], v = a[2 * j + 1];
                a[2 * j] = u * cosine[j] - v * sine[j], a[2 * j + 1] = v * cosine[j] + u * sine[j];
            }
        } else {
            float *b = a + pairs;
            int j = 0;
            for (; j + W <= pairs; j += W) {
                const vf u = load(a + j), v = load(b + j), c = load(cosine + j), s = load(sine + j);
                store(a + j, u * c - v * s), store(b + j, v * c + u * s);
            }
            for (; j < pairs; j++) {
                const float u = a[j], v = b[j];
                a[j] = u * cosine[j] - v * sine[j], b[j] = v * cosine[j] + u * sine[j];
            }
        }
    }
}

}  // namespace
