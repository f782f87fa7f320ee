// Tiles against plain loops: a part of check.cpp, whose helpers it uses.
// A tile, and what memory it points into; x [from, n, D] as it decodes, of the heads that are stored.
struct Tile {
    std::vector<uint8_t> data;
    std::vector<float> more;
    std::vector<uint16_t> small;
    std::vector<int32_t> heads;
    std::vector<double> x;
    Run run{TILE, 0, nullptr, 0};
    double at(int head, int64_t t, int d, int64_t n, int D) const { return x[((heads.empty() ? head : heads[head]) * n + t) * D + d]; }
};

// Numbers times a matrix; codes of a book, `each` numbers to a code; or trits in groups. With `others`, heads read one another's slots.
void tile_of(Tile &out, Kind base, int h, int64_t n, int D, int each, bool others) {
    Run inner{base, n, nullptr, 0};
    out.x.resize(h * n * D);
    out.run.n = n, out.run.width = out.run.wide = D;
    const auto set = [&](int head, int64_t t, int d, double x) { out.x[(head * n + t) * D + d] = x; };
    if (base == FLOAT32) {
        const int width = each;
        out.data.resize(h * n * width * 4), out.more.resize(h * width * D);
        for (auto &m : out.more) m = normal();
        float *rows = reinterpret_cast<float *>(out.data.data());
        for (int64_t i = 0; i < h * n * width; i++) rows[i] = normal();
        for (int head = 0; head < h; head++)
            for (int64_t t = 0; t < n; t++)
                for (int d = 0; d < D; d++) {
                    double x = 0;
                    for (int i = 0; i < width; i++) x += double(rows[(head * n + t) * width + i]) * out.more[(head * width + i) * D + d];
                    set(head, t, d, x);
                }
        inner.head = n * width * 4, inner.row = width * 4, out.run.width = width;
        Stage stage{EXPAND, {FLOAT32, reinterpret_cast<const uint8_t *>(out.more.data()), int64_t(width) * D * 4, int64_t(width) * D * 4, 0, width * D}, {}, {}, {}};
        stage.x = D;
        out.run.stages.push_back(stage);
    } else if (base == TABLE) {
        const int codes = D / each;
        out.data.resize(h * n * codes), out.more.resize(codes * 256 * each);
        for (auto &m : out.more) m = normal();
        for (auto &b : out.data) b = uint8_t(rng());
        for (int head = 0; head < h; head++)
            for (int64_t t = 0; t < n; t++)
                for (int d = 0; d < D; d++) set(head, t, d, out.more[(d / each * 256 + out.data[(head * n + t) * codes + d / each]) * each + d % each]);
        inner.head = n * codes, inner.row = codes, inner.bits = 8, inner.group = codes;
        inner.table = {FLOAT32, reinterpret_cast<const uint8_t *>(out.more.data()), 0, 0, 0, codes * 256 * each};
    } else {
        const int G = each, bytes = (G * D + 4) / 5;
        out.data.resize(h * n / G * bytes), out.small.resize(h * n / G * D);
        for (auto &b : out.data) b = uint8_t(below(243));
        for (int head = 0; head < h; head++)
            for (int64_t t = 0; t < n; t++)
                for (int d = 0; d < D; d++) {
                    const int64_t group = head * (n / G) + t / G, i = d * G + t % G;
                    if (t % G == 0) {
                        const float size = round_to(FLOAT16, grid(0.1f, 0.9f));
                        out.small[group * D + d] = exact16(FLOAT16, size), set(head, t, d, size);
                    }
                    const double size = std::fabs(t % G ? out.x[(head * n + t / G * G) * D + d] : out.x[(head * n + t) * D + d]);
                    int code = out.data[group * bytes + i / 5];
                    for (int k = 0; k < i % 5; k++) code /= 3;
                    set(head, t, d, t % G ? (code % 3 - 1) * size : size);
                }
        for (int head = 0; head < h; head++)  // the first of a group held its size until now
            for (int64_t t = 0; t < n; t += G)
                for (int d = 0; d < D; d++) {
                    int code = out.data[(head * (n / G) + t / G) * bytes + d * G / 5];
                    for (int k = 0; k < d * G % 5; k++) code /= 3;
                    out.x[(head * n + t) * D + d] *= code % 3 - 1;
                }
        inner.head = n / G * bytes, inner.row = bytes, inner.group = G, inner.small = FLOAT16;
        inner.scale = reinterpret_cast<const uint8_t *>(out.small.data()), inner.scale_head = n / G * D * 2;
    }
    inner.data = out.data.data();
    out.run.inner.push_back(inner);
    if (others) {
        for (int head = 0; head < h; head++) out.heads.push_back(below(h));
        out.run.heads = out.heads.data();
    }
}

void tiled(const Set &set, Kind base, int rows, int D, int each, bool others) {
    const int h = 3;
    const int64_t n = 264;
    Tile k, v;
    tile_of(k, base, h, n, D, each, others), tile_of(v, base, h, n, D, each, others);
    std::vector<float> q(h * rows * D), out(h * rows * D), lse(h * rows), scores(h * rows * n), room(rows * (D + 2));
    for (auto &x : q) x = normal();
    k.run.q = q.data();
    Job job{h, rows, D, D, 0.1f, 0, out.data(), lse.data(), {{n, nullptr, 0, scores.data(), {k.run}, {v.run}}}};
    double error = 0, logit = 0, size = 1;
    for (int head = 0; head < h; head++) {
        Partial part{room.data(), room.data() + rows * D, room.data() + rows * (D + 1)};
        set.attend(job, job.segments[0], head, 0, n, part);
        set.merge(job, head, &part, 1);
        for (int r = 0; r < rows; r++) {
            std::vector<double> s(n), o, mine(n * D);
            double l;
            for (int64_t t = 0; t < n; t++) {
                for (int d = 0; d < D; d++) s[t] += double(q[(head * rows + r) * D + d]) * 0.1f * k.at(head, t, d, n, D), mine[t * D + d] = v.at(head, t, d, n, D);
                logit = std::max(logit, std::fabs(scores[(head * rows + r) * n + t] - s[t]));
            }
            attend_row(s, mine.data(), n, D, o, l);
            for (int d = 0; d < D; d++) size = std::max(size, std::fabs(o[d])), error = std::max(error, std::fabs(out[(head * rows + r) * D + d] - o[d]));
        }
    }
    char what[200];
    snprintf(what, sizeof what, "tile of kind %d, %d rows, D %d, %d each, others %d", base, rows, D, each, others);
    expect(set.name, what, error / size, 5e-5), expect(set.name, what, logit, 2e-4);
}
