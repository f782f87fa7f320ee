// Interleaved rANS (Duda, arXiv 1311.2540) with a few frequency tables that the columns of a matrix share.
#include "entropy.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>

#include "pool.h"

namespace kvloom {

namespace {

constexpr int LANES = 8, BITS = 12, TABLES = 16, ROUNDS = 2;
constexpr uint32_t ONE = 1u << BITS, LOW = 1u << 16;  // frequencies of a table sum to ONE; states lie in [LOW, 2^32)
constexpr int64_t BLOCK = 1 << 16;                    // symbols of a stream, about
constexpr int MISSING = 16 << 8;                      // bits, in 256ths, of a symbol that a table lacks, while tables are sought

using Counts = std::array<int64_t, 256>;
using Table = std::array<uint16_t, 256>;

// 256ths of bits that a symbol of frequency f takes: whole numbers, so that every machine finds the same tables.
const std::array<int, ONE + 1> &prices() {
    static const std::array<int, ONE + 1> found = [] {
        std::array<int, ONE + 1> out{};
        out[0] = MISSING;
        for (uint32_t f = 1; f <= ONE; f++) {
            int e = 0;
            while (f >> (e + 1)) e++;
            uint64_t m = uint64_t(f) << (31 - e);
            int log = e;
            for (int i = 0; i < 8; i++) {
                m = m * m >> 31;
                log = 2 * log + int(m >> 32);
                if (m >> 32) m >>= 1;
            }
            out[f] = BITS * 256 - log;
        }
        return out;
    }();
    return found;
}

Table normalized(const Counts &counts) {
    Table f{};
    const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    int64_t left = ONE;
    for (int s = 0; s < 256; s++)
        if (counts[s]) left -= f[s] = uint16_t(std::max<int64_t>(1, counts[s] * ONE / total));
    if (left > 0) *std::max_element(f.begin(), f.end()) += uint16_t(left);
    for (; left < 0; left++) --*std::max_element(f.begin(), f.end());
    return f;
}

void write_table(const Table &f, std::vector<uint8_t> &out) {
    int first = 0, last = 255;
    while (!f[first]) first++;
    while (!f[last]) last--;
    out.push_back(uint8_t(first)), out.push_back(uint8_t(last));
    for (int s = first; s <= last; s++) {
        if (f[s] == 0) {
            int zeros = 0;
            while (!f[s + 1]) zeros++, s++;
            out.push_back(0), out.push_back(uint8_t(zeros));
        } else if (f[s] < 128) {
            out.push_back(uint8_t(f[s]));
        } else {
            out.push_back(uint8_t(f[s] & 127) | 128), out.push_back(uint8_t(f[s] >> 7));
        }
    }
}

struct Model {
    std::vector<Table> tables;
    std::vector<uint8_t> of;  // the table of each column
    int64_t cost;             // 256ths of bits, tables and columns included
};

// k tables: columns sorted by their mean and cut in k parts, then each moved to the table that codes it best.
Model fit(const std::vector<std::vector<std::pair<uint8_t, uint32_t>>> &columns, const std::vector<int> &order, int k) {
    const auto &price = prices();
    const int cols = int(columns.size());
    Model model;
    model.of.resize(cols);
    for (int p = 0; p < cols; p++) model.of[order[p]] = uint8_t(int64_t(p) * k / cols);
    for (int round = 0;; round++) {
        std::vector<Counts> sums(k, Counts{});
        std::vector<bool> used(k, false);
        for (int c = 0; c < cols; c++) {
            used[model.of[c]] = true;
            for (auto [s, n] : columns[c]) sums[model.of[c]][s] += n;
        }
        std::array<uint8_t, TABLES> rename{};
        model.tables.clear();
        for (int i = 0; i < k; i++) {
            rename[i] = uint8_t(model.tables.size());
            if (used[i]) model.tables.push_back(normalized(sums[i]));
        }
        for (auto &t : model.of) t = rename[t];
        k = int(model.tables.size());
        if (round == ROUNDS || k == 1) break;
        std::vector<std::array<int, TABLES>> bits(256);
        for (int s = 0; s < 256; s++)
            for (int i = 0; i < k; i++) bits[s][i] = price[model.tables[i][s]];
        for (int c = 0; c < cols; c++) {
            std::array<int64_t, TABLES> cost{};
            for (auto [s, n] : columns[c])
                for (int i = 0; i < k; i++) cost[i] += int64_t(n) * bits[s][i];
            model.of[c] = uint8_t(std::min_element(cost.begin(), cost.begin() + k) - cost.begin());
        }
    }
    std::vector<uint8_t> head;
    for (const Table &f : model.tables) write_table(f, head);
    model.cost = 8 * 256 * int64_t(head.size() + (k > 1 ? (cols + 1) / 2 : 0));
    for (int c = 0; c < cols; c++)
        for (auto [s, n] : columns[c]) model.cost += int64_t(n) * price[model.tables[model.of[c]][s]];
    return model;
}

Model best(const uint8_t *x, int64_t rows, int cols) {
    std::vector<uint32_t> counts(size_t(cols) * 256);
    for (int64_t r = 0; r < rows; r++, x += cols)
        for (int c = 0; c < cols; c++) counts[size_t(c) * 256 + x[c]]++;
    std::vector<std::vector<std::pair<uint8_t, uint32_t>>> columns(cols);
    std::vector<int64_t> sum(cols);
    for (int c = 0; c < cols; c++)
        for (int s = 0; s < 256; s++)
            if (const uint32_t n = counts[size_t(c) * 256 + s]) columns[c].push_back({uint8_t(s), n}), sum[c] += int64_t(s) * n;
    std::vector<int> order(cols);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sum[a] < sum[b]; });
    Model found = fit(columns, order, 1);
    for (int k = 2; k <= TABLES && k <= cols; k *= 2) {
        Model other = fit(columns, order, k);
        if (other.cost >= found.cost) break;
        found = std::move(other);
    }
    return found;
}

template <class T>
void write(T value, std::vector<uint8_t> &out) {
    for (size_t i = 0; i < sizeof(T); i++) out.push_back(uint8_t(value >> (8 * i)));
}

uint32_t read32(const uint8_t *p) { return p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24; }

struct Slot {
    uint64_t inverse;  // 2^44 / f, rounded up: state * inverse >> 44 is state / f for every state below f << 20
    uint32_t f, start;
};

void encode_stream(const uint8_t *x, int64_t n, int cols, const std::vector<const Slot *> &slots, std::vector<uint16_t> &room,
                   std::vector<uint8_t> &out) {
    room.resize(size_t(n) + 1);  // a word is written each time, and kept where it has to be
    uint16_t *end = room.data() + n + 1, *at = end;
    uint32_t state[LANES];
    std::fill(state, state + LANES, LOW);
    const auto put = [&at](uint32_t s, const Slot &slot) {
        const bool full = s >= uint64_t(slot.f) << (32 - BITS);
        at[-1] = uint16_t(s);
        at -= full;
        s = full ? s >> 16 : s;
        const uint32_t q = uint32_t(s * slot.inverse >> 44);
        return (q << BITS) + (s - q * slot.f) + slot.start;
    };
    int64_t i = n, c = n % cols ? n % cols : cols;
    if (cols % LANES == 0) {
        uint32_t s[LANES];  // apart from `state`, whose address is taken: these stay in registers
        std::fill(s, s + LANES, LOW);
        for (; i > 0; i -= LANES) {
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
            for (int j = LANES - 1; j >= 0; j--) s[j] = put(s[j], slots[size_t(c - LANES + j)][x[i - LANES + j]]);
            c = c == LANES ? cols : c - LANES;
        }
        std::copy(s, s + LANES, state);
    }
    while (i-- > 0) {
        c = c ? c - 1 : cols - 1;
        state[i % LANES] = put(state[i % LANES], slots[size_t(c)][x[i]]);
    }
    for (uint32_t s : state) write(s, out);
    for (; at < end; at++) write(*at, out);
}

int64_t block_rows(int64_t cols) { return std::max<int64_t>(1, BLOCK / cols); }

// One table as the decoder uses it: symbol | frequency - 1 << 8 | place within the symbol's share << 20.
using Lookup = std::array<uint32_t, ONE>;

struct Parsed {
    std::vector<Lookup> tables;
    std::vector<const uint32_t *> of;
    bool good = false;
};

struct Stream {
    int code;
    const uint8_t *data;
    size_t size;
    int64_t row, rows;
};

bool parse(const Coded &code, Parsed &parsed, std::vector<Stream> &streams, int index) {
    const uint8_t *p = code.data, *end = p + code.size;
    if (p == end || *p < 1 || *p > TABLES) return false;
    const int k = *p++;
    parsed.tables.resize(k);
    for (Lookup &table : parsed.tables) {
        if (end - p < 2) return false;
        const int first = p[0], last = p[1];
        p += 2;
        uint32_t at = 0;
        for (int s = first; s <= last; s++) {
            if (p == end) return false;
            uint32_t f = *p++;
            if (f & 128 || !f) {
                if (p == end) return false;
                if (!f) {
                    s += *p++;
                    continue;
                }
                f = (f & 127) | uint32_t(*p++) << 7;
            }
            if (f > ONE - at) return false;
            for (uint32_t i = 0; i < f; i++) table[at++] = uint32_t(s) | (f - 1) << 8 | i << 20;
        }
        if (at != ONE) return false;
    }
    const int64_t cols = code.out.cols, rows = code.out.rows, each = block_rows(cols), count = (rows + each - 1) / each;
    parsed.of.assign(size_t(cols), parsed.tables[0].data());
    if (k > 1) {
        if (end - p < (cols + 1) / 2) return false;
        for (int64_t c = 0; c < cols; c++) {
            const int t = p[c / 2] >> (c % 2 * 4) & 15;
            if (t >= k) return false;
            parsed.of[size_t(c)] = parsed.tables[t].data();
        }
        p += (cols + 1) / 2;
    }
    if ((end - p) / 4 < count) return false;
    const uint8_t *sizes = p;
    p += 4 * count;
    for (int64_t i = 0; i < count; i++, sizes += 4) {
        const uint32_t size = read32(sizes);
        if (size > size_t(end - p) || size < 4 * LANES || size % 2) return false;
        streams.push_back({index, p, size, i * each, std::min(each, rows - i * each)});
        p += size;
    }
    return p == end;
}

inline uint32_t step(uint32_t &s, const uint32_t *table) {
    const uint32_t entry = table[s & (ONE - 1)];
    s = ((entry >> 8 & (ONE - 1)) + 1) * (s >> BITS) + (entry >> 20);
    return entry;
}

template <int STEP>  // bytes between numbers; 0: any
bool decode_stream(const Stream &stream, const Matrix8 &out, const uint32_t *const *of) {
    uint32_t state[LANES];
    for (int j = 0; j < LANES; j++) state[j] = read32(stream.data + 4 * j);
    const uint8_t *word = stream.data + 4 * LANES, *end = stream.data + stream.size;
    const int64_t cols = out.cols, n = stream.rows * cols;
    const int64_t far = STEP ? STEP : out.step;
    uint8_t *to = out.data + stream.row * cols * far;
    int64_t i = 0, c = 0;
    const auto refill = [&word](uint32_t &s) {
        const uint32_t more = s << 16 | word[0] | uint32_t(word[1]) << 8;
        const bool low = s < LOW;
        s = low ? more : s;
        word += low ? 2 : 0;
    };
    if (cols % LANES == 0) {
        uint32_t s[LANES];  // apart from `state`, whose address is taken: these stay in registers
        std::copy(state, state + LANES, s);
        for (; i < n && end - word >= 2 * LANES; i += LANES) {
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
            for (int j = 0; j < LANES; j++) {
                to[(i + j) * far] = uint8_t(step(s[j], of[c + j]));
                refill(s[j]);
            }
            c = c + LANES == cols ? 0 : c + LANES;
        }
        std::copy(s, s + LANES, state);
    }
    for (; i < n; i++) {
        uint32_t &s = state[i % LANES];
        to[i * far] = uint8_t(step(s, of[c]));
        if (s < LOW) {
            if (word == end) return false;
            refill(s);
        }
        c = c + 1 == cols ? 0 : c + 1;
    }
    // the encoder began with these states: other ones mean damage
    return word == end && std::all_of(state, state + LANES, [](uint32_t s) { return s == LOW; });
}

}  // namespace

std::vector<uint8_t> entropy_encode(const Matrix8 &m) {
    const int cols = int(m.cols);
    std::vector<uint8_t> own;
    const uint8_t *x = m.data;
    if (m.step > 1) {
        own.resize(size_t(m.rows * m.cols));
        for (size_t i = 0; i < own.size(); i++) own[i] = m.data[i * size_t(m.step)];
        x = own.data();
    }
    const Model model = best(x, m.rows, cols);
    std::vector<uint8_t> out{uint8_t(model.tables.size())};
    for (const Table &f : model.tables) write_table(f, out);
    if (model.tables.size() > 1)
        for (int c = 0; c < cols; c += 2) out.push_back(uint8_t(model.of[c] | (c + 1 < cols ? model.of[c + 1] << 4 : 0)));
    std::vector<std::array<Slot, 256>> slots(model.tables.size());
    for (size_t t = 0; t < slots.size(); t++) {
        uint32_t start = 0;
        for (int s = 0; s < 256; s++) slots[t][s] = {(uint64_t(1) << 44) / std::max<uint64_t>(1, model.tables[t][s]) + 1, model.tables[t][s], start}, start += model.tables[t][s];
    }
    std::vector<const Slot *> of(cols);
    for (int c = 0; c < cols; c++) of[c] = slots[model.of[c]].data();
    std::vector<uint16_t> room;
    std::vector<uint8_t> streams;
    const int64_t each = block_rows(m.cols);
    for (int64_t row = 0; row < m.rows; row += each) {
        const size_t before = streams.size();
        encode_stream(x + row * cols, std::min(each, m.rows - row) * cols, cols, of, room, streams);
        write(uint32_t(streams.size() - before), out);
    }
    out.insert(out.end(), streams.begin(), streams.end());
    return out;
}

bool entropy_decode(const std::vector<Coded> &codes, int threads) {
    std::vector<Parsed> parsed(codes.size());
    std::vector<std::vector<Stream>> found(codes.size());
    Pool::get().run(int(codes.size()), threads, [&](int i) { parsed[i].good = parse(codes[i], parsed[i], found[i], i); });
    std::vector<Stream> streams;
    for (size_t i = 0; i < codes.size(); i++) {
        if (!parsed[i].good) return false;
        streams.insert(streams.end(), found[i].begin(), found[i].end());
    }
    std::atomic<bool> good{true};
    Pool::get().run(int(streams.size()), threads, [&](int i) {
        const Stream &s = streams[i];
        const Matrix8 &out = codes[s.code].out;
        const auto decode = out.step == 1 ? decode_stream<1> : decode_stream<0>;
        if (!decode(s, out, parsed[s.code].of.data())) good = false;
    });
    return good;
}

}  // namespace kvloom
