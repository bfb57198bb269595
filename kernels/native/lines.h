// A second form of the forward, for separable patterns whose keys along the last axis are coordinates side by side: here the
// lanes are keys and not queries. A line is all keys with the same other coordinates, and a tile of queries, rows along the
// second axis and columns along the last one, needs from every line as many vectors of keys as cover what its columns see.
// Scores are one product of such a vector per query; a row takes part only in the lines that it sees, and values are added
// up over exactly the keys that a query sees. Where windows are narrow that computes far fewer pairs than tile.h does.
//
// Keys are needed with their channels apart, [channel, coordinate]. Every thread copies the lines near its tiles for itself,
// into a ring that stays in its cache: that is faster than to have them copied to memory and to fetch them again.
#pragma once
#include "call.h"

constexpr int QUERIES = 32, COLUMNS = 4;   // of a tile, at most
constexpr int SUMMED = 6;                  // queries whose sums of MOST vectors are kept in registers
constexpr int64_t NEAR = 1 << 18;          // floats of copied lines: half of a second-level cache

// The keys of one line: [channel, coordinate] and [coordinate, channel]; the rows from `first` to `stop` - 1 see them.
struct Line {
    const float *key, *value;
    int first, stop;
};

// The weights of rows of queries in one column, for the keys of the first of some lines that all of these rows see.
struct Weights {
    float* const* row;
    int64_t count, at, step;  // row i is at row[i * count] + at; `step` floats on are the weights of the next line
};

// out[i] += sum over lines and the `run` keys of each of weight * value, for N rows of C vectors.
template <int N, int C>
static INLINE void add_lines(float* out, int64_t out_step, const Weights& weights, const Line* line, int64_t at, int lines,
                             int run, int width) {
    vec sum[N][C];
    const float* w[N];
    UNROLL for (int i = 0; i < N; i++) {
        w[i] = weights.row[i * weights.count] + weights.at;
        UNROLL for (int c = 0; c < C; c++) sum[i][c] = load(out + i * out_step + c * LANES);
    }
    for (int l = 0; l < lines; l++) {
        const float* row = line[l].value + at;
        for (int j = 0; j < run; j++, row += width) {
            vec x[C];
            UNROLL for (int c = 0; c < C; c++) x[c] = load(row + c * LANES);
            UNROLL for (int i = 0; i < N; i++) {
                const float p = w[i][j];
                UNROLL for (int c = 0; c < C; c++) sum[i][c] += p * x[c];
            }
        }
        UNROLL for (int i = 0; i < N; i++) w[i] += weights.step;
    }
    UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int c = 0; c < C; c++) store(out + i * out_step + c * LANES, sum[i][c]);
}

static APART void add_values(int count, float* out, int64_t out_step, Weights weights, const Line* line, int64_t at,
                             int lines, int run, int width) {
    for (int parts = (count + SUMMED - 1) / SUMMED; parts > 0; parts--) {
        const int some = (count + parts - 1) / parts;
        with_constant<SUMMED>(some, [&](auto constant) INLINE_LAMBDA {
            constexpr int N = decltype(constant)::value;
            int c = 0;
            for (; c + MOST * LANES <= width; c += MOST * LANES)
                add_lines<N, MOST>(out + c, out_step, weights, line, at + c, lines, run, width);
            for (; c < width; c += LANES)
                add_lines<N, 1>(out + c, out_step, weights, line, at + c, lines, run, width);
        });
        count -= some, out += some * out_step, weights.row += some * weights.count;
    }
}

// The memory of one thread, and the part of the grid it is at.
class LineForward {
    const Call& call;
    const Lines& plan;
    const Axis &outer = plan.axis[0], &rows = plan.axis[1], &columns = plan.axis[2];
    int planes = 0, ring = 0, reach = 0;      // most lines of a tile, along axis 0 and 1; most keys of a block in a line
    int64_t step = 0, slots = 0, pitch = 0;   // floats: of a channel of a line; of a query's scores of a line, of all lines
    Scratch scratch;
    float *keys, *values, *queries, *scores, *sums;
    float* biases = nullptr;  // of all heads, in units of log 2, with a vector of zeros before and behind
    std::vector<Line> lines;

    int64_t batch = 0, kv_head = 0, plane = 0, left = 0, right = 0, ready = 0;

  public:
    int64_t blocks = 1;  // pieces of the last axis, so that the copied lines stay near

    LineForward(const Call& call, const Lines& plan) : call(call), plan(plan) {
        int seen = 0, across = 0;
        for (int p = 0; p < outer.tiles; p++) planes = std::max(planes, outer.high[p] - outer.low[p]);
        for (int t = 0; t < rows.tiles; t++)
            ring = std::max(ring, rows.high[rows.cut[t + 1] - 1] - rows.low[rows.cut[t]]);
        for (int p = 0; p < rows.cut[rows.tiles]; p++) seen = std::max(seen, rows.high[p] - rows.low[p]);
        for (int t = 0; t < columns.tiles; t++)
            across = std::max(across, columns.high[columns.cut[t + 1] - 1] - columns.low[columns.cut[t]]);
        auto width = [&] {
            reach = 0;
            for (int b = 0; b < blocks; b++) {
                const int from = columns.cut[columns.tiles * b / blocks], to = columns.cut[columns.tiles * (b + 1) / blocks];
                reach = std::max(reach, columns.high[to - 1] - columns.low[from]);
            }
            step = (reach + LANES - 1) / LANES * LANES + LANES;
            return (call.sizes.key + call.sizes.value_step) * step;
        };
        while (ring * planes * width() > NEAR && blocks < columns.tiles && reach > 2 * across) blocks++;
        slots = (across + LANES - 1) / LANES * LANES;
        // with room for a vector before and behind; odd, so that queries do not fall on each other in the cache
        pitch = (seen * planes * slots / LANES + 2 | 1) * LANES;
    }

    void reserve() {
        keys = scratch.floats(ring * planes * step * call.sizes.key);
        std::memset(keys, 0, sizeof(float) * ring * planes * step * call.sizes.key);
        values = scratch.floats(ring * planes * reach * call.sizes.value_step);
        queries = scratch.floats(QUERIES * call.sizes.key);
        scores = scratch.floats(QUERIES * pitch);
        sums = scratch.floats(QUERIES * call.sizes.value_step);
        if (!call.bias) return;
        biases = scratch.floats(entries() + 2 * LANES) + LANES;
        for (int64_t i = -LANES; i < entries() + LANES; i++)
            biases[i] = i >= 0 && i < entries() ? call.bias[i] * LOG2E : 0;
    }

    // Every query of block `b` of the last axis whose tile is one of [from, to) along axis 1 and `p` along axis 0.
    void work(int64_t batch_, int64_t kv_head_, int64_t p, int64_t b, int64_t from, int64_t to) {
        batch = batch_, kv_head = kv_head_, plane = p, ready = 0;
        const int64_t u0 = columns.tiles * b / blocks, u1 = columns.tiles * (b + 1) / blocks;
        left = columns.low[columns.cut[u0]], right = columns.high[columns.cut[u1] - 1];
        for (int64_t t = from; t < to; t++) {
            list_lines(rows.cut[t], rows.cut[t + 1]);
            for (int64_t g = 0; g < call.group; g++)
                for (int64_t u = u0; u < u1; u++) {
                    const int count = columns.cut[u + 1] - columns.cut[u];
                    attend(kv_head * call.group + g, rows.cut[t], rows.cut[t + 1], columns.cut[u], count);
                }
        }
    }

  private:
    // The lines that the rows from `first` to `stop` - 1 see, the ones of a row of the grid side by side; copies those that
    // are new. Both ends of what is seen only ever grow, so the ring holds what came before as long as it is needed.
    void list_lines(int first, int stop) {
        const int low = rows.low[first], high = rows.high[stop - 1];
        int a = first, b = first;
        lines.clear();
        for (int l = low; l < high; l++) {
            while (a < stop && rows.high[a] <= l) a++;
            while (b < stop && rows.low[b] <= l) b++;
            for (int o = outer.low[plane]; o < outer.high[plane]; o++) {
                const int64_t place = l % ring * planes + o - outer.low[plane];
                float* key = keys + place * step * call.sizes.key;
                float* value = values + place * reach * call.sizes.value_step;
                if (l >= ready) copy_line(key, value, outer.order[o], rows.order[l]);
                lines.push_back({key, value, a - first, b - first});
            }
        }
        ready = std::max<int64_t>(ready, high);
    }

    void copy_line(float* key, float* value, int64_t i, int64_t j) {
        const Sizes& sizes = call.sizes;
        for (int64_t x = 0; left + x < right; x += LANES) {  // zeros or old keys behind are multiplied, too, but not seen
            const float* row[LANES];
            for (int n = 0; n < LANES; n++) {
                row[n] = left + x + n < right ? plan.key.at(batch, kv_head, i, j, left + x + n) : nullptr;
                if (left + x + n + LANES < right) fetch(row[n] + LANES * plan.key.axis[2], sizes.key);
            }
            transpose_rows(key + x, step, row, sizes.key, 1);
        }
        for (int64_t x = left; x < right; x++, value += sizes.value_step) {
            const float* row = plan.value.at(batch, kv_head, i, j, x);
            fetch(row + 8 * plan.value.axis[2], sizes.value);
            int c = 0;
            for (; c + LANES <= sizes.value; c += LANES) store(value + c, load(row + c));
            for (; c < sizes.value_step; c++) value[c] = c < sizes.value ? row[c] : 0;
        }
    }

    // The tile of the rows from `first` to `stop` - 1 and of `count` columns from coordinate `x` on.
    void attend(int64_t head, int first, int stop, int x, int count) {
        const Sizes& sizes = call.sizes;
        const int tall = stop - first, last = x + count - 1, from = columns.low[x];
        const int vectors = (columns.high[last] - from + LANES - 1) / LANES, many = (int)lines.size();
        const float* q[QUERIES] = {};
        float* scored[QUERIES];  // where a row would have its scores of the first of the lines, seen or not
        for (int i = 0, at = 0; i < tall; i++) {
            const int unseen = rows.low[first + i] - rows.low[first];
            for (int n = 0; n < count; n++, at++) {
                q[at] = call.q.at(batch, head, outer.order[plane], rows.order[first + i], x + n);
                scored[at] = scores + at * pitch + LANES - unseen * wide() * vectors * LANES;
            }
        }
        for (int n = 0; n < tall * count; n += LANES)
            transpose_rows(queries + n, QUERIES, q + n, sizes.key, call.scale * LOG2E);

        for (int u = 0, ahead = 0; u < many * vectors; u += 2) {
            const int v = u + 1 < many * vectors ? u + 1 : u;
            const Line &one = lines[u / vectors], &two = lines[v / vectors];
            const int low = std::min(one.first, two.first), high = std::max(one.stop, two.stop);
            const float* key[2] = {one.key + from - left + u % vectors * LANES, two.key + from - left + v % vectors * LANES};
            // a row that sees only one of them has the other score written beside its own
            dot_pairs((high - low) * count, queries + low * count, QUERIES, key, step, sizes.key, scored + low * count,
                      u * LANES, (v - u) * LANES);
            for (; ahead < tall * count && ahead * many * vectors < (u + 2) * tall * count; ahead++)
                fetch(q[ahead] + count * call.q.axis[2], sizes.key);  // queries of the next tile
        }

        float by[QUERIES];
        std::memset(sums, 0, sizeof(float) * tall * count * sizes.value_step);
        for (int i = 0; i < tall; i++) {
            float* score = scores + i * count * pitch + LANES;
            if (call.bias) add_bias(score, head, first + i, x, count, vectors);
            with_constant<COLUMNS>(count, [&](auto constant) INLINE_LAMBDA {
                weigh<decltype(constant)::value>(score, first + i, x, vectors, row_of(head, first + i, x), by + i * count);
            });
        }
        for (int l = 0; l < many;) {
            int end = l + 1;
            while (end < many && lines[end].first == lines[l].first && lines[end].stop == lines[l].stop) end++;
            const int low = lines[l].first, high = lines[l].stop;
            for (int n = 0; n < count; n++) {
                const int at = columns.low[x + n], run = columns.high[x + n] - at;
                const Weights weights{scored + low * count + n, count, l * vectors * LANES + at - from, vectors * LANES};
                add_values(high - low, sums + (low * count + n) * sizes.value_step, count * sizes.value_step, weights,
                           &lines[l], (at - left) * sizes.value_step, end - l, run, sizes.value_step);
            }
            l = end;
        }
        for (int i = 0; i < tall; i++) {
            float* row = call.out + row_of(head, first + i, x) * sizes.value;
            for (int n = 0; n < count; n++, row += (int64_t)call.group * call.kv_heads * sizes.value) {
                const float* sum = sums + (i * count + n) * sizes.value_step;
                int c = 0;
                for (; c + LANES <= sizes.value; c += LANES) store(row + c, load(sum + c) * by[i * count + n]);
                for (; c < sizes.value; c++) row[c] = sum[c] * by[i * count + n];
            }
        }
    }

    int wide() const { return outer.high[plane] - outer.low[plane]; }  // lines per row of the grid

    int64_t row_of(int64_t head, int row, int x) const {
        const int64_t token = (outer.order[plane] * (int64_t)call.grid[1] + rows.order[row]) * call.grid[2] + x;
        return (batch * call.tokens() + token) * call.group * call.kv_heads + head;
    }

    int64_t entries() const { return (int64_t)call.group * call.kv_heads * call.entries; }

    // To the scores of `count` queries of a row: the entries of keys side by side are, too. What is added to keys that are
    // not seen does not matter, and may come from elsewhere in the table.
    APART void add_bias(float* score, int64_t head, int row, int x, int count, int vectors) const {
        const int64_t base = head * call.entries + call.middle + columns.low[x] - x;
        for (int l = rows.low[row]; l < rows.high[row]; l++)
            for (int o = outer.low[plane]; o < outer.high[plane]; o++, score += vectors * LANES) {
                const int64_t at = base + (o - plane) * call.step[0] + (l - row) * call.step[1];
                for (int n = 0; n < count; n++)
                    for (int s = 0; s < vectors; s++) {
                        float* to = score + n * pitch + s * LANES;
                        store(to, load(to) + load(biases + std::clamp<int64_t>(at - n + s * LANES, -LANES, entries())));
                    }
            }
    }

    // The scores of N queries of a row, from coordinate `x` on, to weights; `by` is what to multiply their sums with. They are
    // number `out` and following in the output.
    template <int N>
    INLINE void weigh(float* score, int row, int x, int vectors, int64_t out, float* by) {
        const int seen = (rows.high[row] - rows.low[row]) * wide(), first = columns.low[x];
        const int64_t apart = pitch, next = vectors * LANES, heads = call.group * call.kv_heads;
        auto mine = [&](int n, int s) INLINE_LAMBDA {  // lanes of vector s of a line that query n sees
            const int from = std::max(columns.low[x + n] - first - s * LANES, 0);
            const int to = std::min(columns.high[x + n] - first - s * LANES, LANES);
            return named(from < to ? uint32_t((1ull << to) - (1ull << from)) : 0);
        };
        auto fetch_out = [&](int from, int to) INLINE_LAMBDA {  // a few at a time: the memory takes no more at once
            const int width = call.sizes.value;
            for (int n = from; n < to; n++) fetch_to_write(call.out + (out + n * heads) * width, width);
        };
        vec all[N], sum[N];
        float most[N], base[N];
        UNROLL for (int n = 0; n < N; n++) all[n] = splat(NOTHING), sum[n] = vec{};
        fetch_out(0, N / 2);
        for (int s = 0; s < vectors; s++) {
            vec top[N];
            UNROLL for (int n = 0; n < N; n++) top[n] = splat(NOTHING);
            const float* at = score + s * LANES;
            for (int l = 0; l < seen; l++, at += next)
                UNROLL for (int n = 0; n < N; n++) top[n] = larger(top[n], load(at + n * apart));
            UNROLL for (int n = 0; n < N; n++) all[n] = larger(all[n], mine(n, s) ? top[n] : splat(NOTHING));
        }
        UNROLL for (int n = 0; n < N; n++) most[n] = largest(all[n]), base[n] = most[n] == NOTHING ? 0 : most[n];
        fetch_out(N / 2, N);
        for (int s = 0; s < vectors; s++) {
            vec part[N] = {};
            float* at = score + s * LANES;
            for (int l = 0; l < seen; l++, at += next)
                UNROLL for (int n = 0; n < N; n++) {
                    const vec p = exp2(load(at + n * apart) - base[n]);
                    store(at + n * apart, p);
                    part[n] += p;
                }
            UNROLL for (int n = 0; n < N; n++) sum[n] += mine(n, s) ? part[n] : vec{};
        }
        UNROLL for (int n = 0; n < N; n++) {
            float whole = total(sum[n]);
            if (most[n] == NOTHING && whole == whole) whole = 0;  // nothing seen, or nothing but scores of minus infinity
            by[n] = whole == 0 ? 0 : 1 / whole;
            if (call.lse)
                call.lse[out + n * heads] = whole == 0 ? NOTHING : float((most[n] + std::log2((double)whole)) * LN2);
        }
    }
};

// A thread takes a band of tiles of one block, head and coordinate of axis 0, top to bottom.
static int forward_lines(const Call& call, const Lines& plan) {
    const int64_t blocks = LineForward(call, plan).blocks, tiles = plan.axis[1].tiles, planes = plan.axis[0].tiles;
    const int64_t parts = (int64_t)call.batch * call.kv_heads * planes * blocks;
    const int64_t bands = std::max<int64_t>(1, std::min((4 * call.threads + parts - 1) / parts, tiles));
    return share(call.threads, parts * bands, 1, [&](auto next) {
        LineForward forward(call, plan);
        forward.reserve();
        for (int64_t job = next(); job >= 0; job = next()) {
            const int64_t band = job % bands, part = job / bands, head = part / blocks / planes;
            forward.work(head / call.kv_heads, head % call.kv_heads, part / blocks % planes, part % blocks,
                         tiles * band / bands, tiles * (band + 1) / bands);
        }
    });
}
