// One tile: up to LANES * NV queries, one per lane, against lists of keys. Scores are kept transposed, [key, lane], so
// that maximum, exponential and sum run down the lanes, and keys and values are read where they are.
#pragma once
#include <cmath>
#include <cstring>

#include "vector.h"

constexpr int CHUNK = 256;                        // keys at a time: their scores stay in the first-level cache
constexpr float LOG2E = 1.4426950408889634f;      // scores are kept in units of log 2
constexpr double LN2 = 0.6931471805599453;

// Keys of a tile: where their rows start, counted in floats from a base, and which lanes see them.
struct Keys {
    int64_t count;
    const int64_t *key, *value;
    const uint32_t* lanes;
};

struct Sizes {
    int head_dim, value_dim;  // value_dim is a multiple of LANES
};

template <int NV>
struct Tile {
    static constexpr int WIDTH = LANES * NV;
    static constexpr int KEYS = NV == 1 || LANES == 16 ? 8 : 4;  // as many as fit the registers
    float *columns;  // queries times scale, [head_dim, WIDTH]
    float *scores;   // [CHUNK + KEYS, WIDTH]
    float *out;      // [WIDTH, value_dim]
    vec top[NV], sum[NV];
    bool careful;    // values that are not finite must not reach lanes that do not see them

    void start(const Sizes& sizes) {
        for (int n = 0; n < NV; n++) top[n] = splat(NOTHING), sum[n] = vec{};
        std::memset(out, 0, sizeof(float) * WIDTH * sizes.value_dim);
    }

    // Scores of `count` keys into `scores`, minus infinity where a lane does not see the key; returns the largest.
    void score(const Keys& keys, int64_t first, int count, const float* key, const Sizes& sizes, vec (&most)[NV]) {
        for (int j = 0; j < count; j += KEYS) {
            const float* row[KEYS];
            uint32_t lanes[KEYS];
            UNROLL for (int i = 0; i < KEYS; i++) {
                bool real = j + i < count;  // what is left over repeats a row that no lane sees
                row[i] = key + keys.key[first + (real ? j + i : j)];
                lanes[i] = real ? keys.lanes[first + j + i] : 0;
            }
            vec dots[KEYS][NV];
            dot_rows<KEYS, NV>(row, columns, sizes.head_dim, dots);
            UNROLL for (int i = 0; i < KEYS; i++)
                UNROLL for (int n = 0; n < NV; n++) {
                    vec s = named(lanes[i] >> (n * LANES)) ? dots[i][n] : splat(NOTHING);
                    store(scores + (j + i) * WIDTH + n * LANES, s);
                    most[n] = larger(most[n], s);
                }
        }
    }

    // Take in a list of keys: one chunk after the other, with a running maximum and sum.
    void absorb(const Keys& keys, const float* key, const float* value, const Sizes& sizes) {
        for (int64_t first = 0; first < keys.count; first += CHUNK) {
            int count = keys.count - first < CHUNK ? int(keys.count - first) : CHUNK;
            vec most[NV], base[NV];
            for (int n = 0; n < NV; n++) most[n] = top[n];
            score(keys, first, count, key, sizes, most);
            for (int n = 0; n < NV; n++) {
                base[n] = most[n] == NOTHING ? vec{} : most[n];  // nothing seen so far
                rescale(n, exp2(top[n] - base[n]), sizes.value_dim);
                top[n] = most[n];
            }
            for (int j = 0; j < count; j++)
                UNROLL for (int n = 0; n < NV; n++) {
                    float* at = scores + j * WIDTH + n * LANES;
                    vec s = load(at), p = exp2(s - base[n]);
                    p = s == NOTHING ? vec{} : p;
                    store(at, p);
                    sum[n] += p;
                }
            if (careful)
                add_careful(count, value, keys.value + first, sizes.value_dim);
            else
                add(out, sizes.value_dim, count, value, keys.value + first);
        }
    }

    void rescale(int n, vec by, int width) {
        bool same = true;
        for (int i = 0; i < LANES; i++) same &= by[i] == 1.0f;
        if (same) return;
        sum[n] *= by;
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < width; c += LANES) {
                float* at = out + (n * LANES + i) * width + c;
                store(at, load(at) * by[i]);
            }
    }

    // into[lane] += sum over keys of scores[key][lane] * row[key]
    void add(float* into, int width, int count, const float* base, const int64_t* offset) {
        constexpr int MOST = LANES == 16 ? 4 : 2;  // vectors of a row at a time, as many as fit the registers
        int c = 0;
        for (; c + MOST * LANES <= width; c += MOST * LANES)
            for (int i = 0; i < WIDTH; i += 4)
                add_rows<4, MOST>(into + i * width + c, width, scores + i, WIDTH, count, base + c, offset);
        for (; c < width; c += LANES)
            for (int i = 0; i < WIDTH; i += 4)
                add_rows<4, 1>(into + i * width + c, width, scores + i, WIDTH, count, base + c, offset);
    }

    void add_careful(int count, const float* base, const int64_t* offset, int width) {
        for (int j = 0; j < count; j++)
            for (int i = 0; i < WIDTH; i++)
                if (float p = scores[j * WIDTH + i]; p != 0)
                    for (int c = 0; c < width; c++) out[i * width + c] += p * base[offset[j] + c];
    }

    float log_sum(int lane) const {  // natural log of the sum of exponentials
        float total = sum[lane / LANES][lane % LANES];
        return total == 0 ? NOTHING : float((top[lane / LANES][lane % LANES] + std::log2((double)total)) * LN2);
    }

    // One row of the result; false when it holds anything that is not finite.
    bool finish(int lane, float* row, int width) const {
        float total = sum[lane / LANES][lane % LANES];
        float by = total == 0 ? 0.0f : 1.0f / total;
        vec odd = vec{};
        for (int c = 0; c < width; c += LANES) {
            vec x = load(out + lane * width + c) * by;
            store(row + c, x);
            odd += x * 0.0f;
        }
        float rest = 0;
        for (int i = 0; i < LANES; i++) rest += odd[i];
        return rest == 0;
    }
};
