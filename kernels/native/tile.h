// One tile: up to LANES * NV queries, one per lane, against lists of keys. Scores are kept transposed, [key, lane], so
// that maximum, exponential and sum run down the lanes, and keys and values are read where they are.
#pragma once
#include <cmath>
#include <cstring>

#include "vector.h"

constexpr int EIGHT = 8;
constexpr int CHUNK = 96;                     // keys at a time: two threads of a core share its first-level cache
constexpr int BLOCK = 64;                     // keys whose rows are read several times over
constexpr int GROUP = 4;                      // lanes whose sums are kept in registers together,
constexpr int MOST = LANES == 16 ? 4 : 2;     // for so many vectors of a row
constexpr float LOG2E = 1.4426950408889634f;  // scores are kept in units of log 2
constexpr double LN2 = 0.6931471805599453;

// Keys of a tile: token numbers counted from a base, and which lanes see them. Behind the last one the arrays go on to a
// multiple of EIGHT with keys that no lane sees.
struct Keys {
    int64_t count;
    const int32_t* token;
    const uint32_t* lanes;
    const float* bias = nullptr;  // [count, lanes of a tile], to be added to scores in units of log 2; null for none
    float* slopes = nullptr;      // as bias: where to add the gradients of the scores

    void skip(int some, int width) {
        count -= some, token += some, lanes += some;
        if (bias) bias += some * width;
        if (slopes) slopes += some * width;
    }
};

// Numbers per row, and floats from one row to the next: the same, rounded up to whole vectors.
struct Sizes {
    int key, value, key_step, value_step;
};

template <int NV>
struct Tile {
    static constexpr int WIDTH = LANES * NV;
    static constexpr int KEYS = NV == 1 || LANES == 16 ? 8 : 4;  // as many as fit the registers
    float* columns;  // queries times scale, [key, WIDTH]
    float* scores;   // [CHUNK + KEYS, WIDTH]
    float* out;      // [WIDTH, value_step]
    vec top[NV], sum[NV];
    bool careful;  // values that are not finite must not reach lanes that do not see them

    void start(const Sizes& sizes) {
        for (int n = 0; n < NV; n++) top[n] = splat(NOTHING), sum[n] = vec{};
        std::memset(out, 0, sizeof(float) * WIDTH * sizes.value_step);
    }

    // Take in a list of keys: one chunk after the other, with a running maximum and sum.
    void absorb(Keys keys, const float* key, const float* value, const Sizes& sizes) {
        for (; keys.count > 0; keys.skip(CHUNK, WIDTH)) {
            const int count = keys.count < CHUNK ? int(keys.count) : CHUNK;
            vec most[NV], base[NV];
            for (int n = 0; n < NV; n++) most[n] = top[n];
            if (keys.bias)
                score<true>(keys, count, key, sizes, most);
            else
                score<false>(keys, count, key, sizes, most);
            for (int n = 0; n < NV; n++) {
                base[n] = most[n] == NOTHING ? vec{} : most[n];  // nothing seen so far
                rescale(n, exp2(top[n] - base[n]), sizes.value_step);
                top[n] = most[n];
            }
            weigh(count, base);
            if (careful)
                add_careful(keys.token, count, value, sizes.value_step);
            else
                add(out, sizes.value_step, scores, keys, count, value);
        }
    }

    // Scores of `count` keys, minus infinity where a lane does not see the key; `most` becomes the largest.
    template <bool BIASED>
    APART void score(const Keys& keys, int count, const float* key, const Sizes& sizes, vec (&most)[NV]) {
        dots(keys, count, key, sizes.key_step, sizes.key, columns, [&](int j, int n, uint32_t lanes, vec dot) {
            if constexpr (BIASED) dot += load(keys.bias + j * WIDTH + n * LANES);
            vec s = named(lanes) ? dot : splat(NOTHING);
            store(scores + j * WIDTH + n * LANES, s);
            most[n] = larger(most[n], s);
        });
    }

    // Call `take(key number, vector, lanes of it that see the key, products of the key's row with `columns`)`.
    template <class Take>
    static INLINE void dots(const Keys& keys, int count, const float* base, int step, int dim, const float* columns,
                            Take take) {
        for (int j = 0; j < count; j += KEYS) {
            const float* row[KEYS];
            uint32_t any = 0;
            UNROLL for (int i = 0; i < KEYS; i++) {
                row[i] = base + (int64_t)keys.token[j + i] * step;
                any |= keys.lanes[j + i];
                if (j + KEYS < count) fetch(base + (int64_t)keys.token[j + KEYS + i] * step, dim);
            }
            const bool left = any << (32 - LANES), right = NV == 2 && any >> LANES;
            if (NV == 1 || (left && right))
                some_dots<0, NV>(keys, j, row, columns, dim, take);
            else if (left)
                some_dots<0, 1>(keys, j, row, columns, dim, take);
            else
                some_dots<NV - 1, 1>(keys, j, row, columns, dim, take);
        }
    }

    template <int FIRST, int COUNT, class Take>
    static INLINE void some_dots(const Keys& keys, int j, const float* const (&row)[KEYS], const float* columns, int dim,
                                 Take take) {
        vec dot[KEYS][COUNT];
        dot_rows<KEYS, COUNT>(row, columns + FIRST * LANES, WIDTH, dim, dot);
        UNROLL for (int i = 0; i < KEYS; i++)
            UNROLL for (int n = 0; n < NV; n++) {
                const bool done = n >= FIRST && n < FIRST + COUNT;  // no lane of the other vector sees any of them
                take(j + i, n, done ? keys.lanes[j + i] >> (n * LANES) : 0, dot[i][done ? n - FIRST : 0]);
            }
    }

    // Scores to weights, which are 0 where a lane does not see the key.
    APART void weigh(int count, const vec (&base)[NV]) {
        for (int j = 0; j < count; j++)
            UNROLL for (int n = 0; n < NV; n++) {
                float* at = scores + j * WIDTH + n * LANES;
                vec s = load(at), p = exp2(s - base[n]);
                p = s == NOTHING ? vec{} : p;
                store(at, p);
                sum[n] += p;
            }
    }

    void rescale(int n, vec by, int width) {
        bool same = true;
        for (int i = 0; i < LANES; i++) same &= by[i] == 1.0f || sum[n][i] == 0.0f;
        if (same) return;
        sum[n] *= by;
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < width; c += LANES) {
                float* at = out + (n * LANES + i) * width + c;
                store(at, load(at) * by[i]);
            }
    }

    // into[lane] += sum over keys of weights[key][lane] * row[key], for so few keys at a time that their rows stay near
    static APART void add(float* into, int width, const float* weights, const Keys& keys, int count, const float* base) {
        for (int first = 0; first < count; first += BLOCK) {
            const int stop = first + BLOCK < count ? first + BLOCK : count;
            for (int j = first; j < stop; j++) fetch(base + (int64_t)keys.token[j] * width, width);
            for (int i = 0; i < WIDTH; i += GROUP) {
                const uint32_t some = ((1u << GROUP) - 1) << i;
                int from = first, to = stop;
                while (from < to && !(keys.lanes[from] & some)) from++;
                while (from < to && !(keys.lanes[to - 1] & some)) to--;
                const float* weight = weights + from * WIDTH + i;
                const int32_t* token = keys.token + from;
                int c = 0;
                for (; c + MOST * LANES <= width; c += MOST * LANES)
                    add_rows<GROUP, MOST>(into + i * width + c, width, weight, WIDTH, base + c, token, to - from);
                for (; c < width; c += LANES)
                    add_rows<GROUP, 1>(into + i * width + c, width, weight, WIDTH, base + c, token, to - from);
            }
        }
    }

    void add_careful(const int32_t* token, int count, const float* base, int width) {
        for (int j = 0; j < count; j++)
            for (int i = 0; i < WIDTH; i++)
                if (const float p = scores[j * WIDTH + i]; p != 0)
                    for (int c = 0; c < width; c++) out[i * width + c] += p * base[(int64_t)token[j] * width + c];
    }

    float log_sum(int lane) const {  // natural log of the sum of exponentials
        const float total = sum[lane / LANES][lane % LANES];
        return total == 0 ? NOTHING : float((top[lane / LANES][lane % LANES] + std::log2((double)total)) * LN2);
    }

    // Divide the sums of a lane and write them to `row`; returns what is 0 when all of them are finite, else NaN.
    INLINE vec finish(int lane, float* row, const Sizes& sizes) const {
        const float total = sum[lane / LANES][lane % LANES], by = total == 0 ? 0.0f : 1.0f / total;
        const float* from = out + lane * sizes.value_step;
        vec odd{};
        for (int c = 0; c < sizes.value; c += LANES) {
            const vec x = load(from + c) * by;
            if (c + LANES <= sizes.value)
                store(row + c, x);
            else
                std::memcpy(row + c, &x, sizeof(float) * (sizes.value - c));
            odd += x * 0.0f;
        }
        return odd;
    }
};

// Rows of `dim` floats, LANES of them, as columns times `scale`, which are `step` floats apart. Zeros where a row is null.
static APART void transpose_rows(float* columns, int64_t step, const float* const* row, int dim, float scale) {
    bool all = true;
    for (int i = 0; i < LANES; i++) all &= row[i] != nullptr;
    for (int d = 0; d < dim; d += LANES) {
        const int some = dim - d < LANES ? dim - d : LANES;
        vec block[LANES];
        if (all && some == LANES) {
            UNROLL for (int i = 0; i < LANES; i++) block[i] = load(row[i] + d) * scale;
            transpose(block);
            UNROLL for (int i = 0; i < LANES; i++) store(columns + (d + i) * step, block[i]);
        } else {
            float rest[LANES][LANES] = {};
            for (int i = 0; i < LANES; i++)
                if (row[i]) std::memcpy(rest[i], row[i] + d, sizeof(float) * some);
            for (int i = 0; i < LANES; i++) block[i] = load(rest[i]) * scale;
            transpose(block);
            for (int i = 0; i < some; i++) store(columns + (d + i) * step, block[i]);
        }
    }
}

// The same for the lanes of NV vectors: [dim, NV, LANES].
template <int NV>
static void gather_columns(float* columns, const float* const* lane, int dim, float scale) {
    for (int n = 0; n < NV; n++) transpose_rows(columns + n * LANES, NV * LANES, lane + n * LANES, dim, scale);
}
