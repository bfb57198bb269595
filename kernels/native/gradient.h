// The backward of one tile: weights are computed again from the log-sum-exp of the forward.
#pragma once
#include "tile.h"

template <int NV>
struct Gradient : Tile<NV> {
    using Base = Tile<NV>;
    using Base::WIDTH;
    float* slopes;       // [CHUNK + EIGHT, WIDTH] gradients of the scores
    float* d_columns;    // gradients of the output, [value, WIDTH]
    float *rows, *d_rows;  // queries times scale, [WIDTH, key_step]; gradients of the output, [WIDTH, value_step]
    float* d_query;      // [WIDTH, key_step]
    vec shift[NV];       // log-sum-exp in units of log 2
    vec delta[NV];       // sum of out * gradient of out, less the gradient of the log-sum-exp

    // Add to the gradients of the queries of this tile and of the listed keys and values.
    void pull(Keys keys, const float* key, const float* value, float* d_key, float* d_value, const Sizes& sizes) {
        for (; keys.count > 0; keys.skip(CHUNK, WIDTH)) {
            const int count = keys.count < CHUNK ? int(keys.count) : CHUNK;
            if (keys.bias)
                weights<true>(keys, count, key, sizes);
            else
                weights<false>(keys, count, key, sizes);
            slope(keys, count, value, sizes);
            for (int i = 0; keys.slopes && i < count * WIDTH; i += LANES)
                store(keys.slopes + i, load(keys.slopes + i) + load(slopes + i));
            Base::add(d_query, sizes.key_step, slopes, keys, count, key);
            spread(d_value, sizes.value_step, this->scores, keys, count, d_rows);
            spread(d_key, sizes.key_step, slopes, keys, count, rows);
        }
    }

    template <bool BIASED>
    APART void weights(const Keys& keys, int count, const float* key, const Sizes& sizes) {
        Base::dots(keys, count, key, sizes.key_step, sizes.key, this->columns, [&](int j, int n, uint32_t lanes, vec dot) {
            if constexpr (BIASED) dot += load(keys.bias + j * WIDTH + n * LANES);
            vec p = exp2(dot - shift[n]);
            store(this->scores + j * WIDTH + n * LANES, named(lanes) ? p : vec{});
        });
    }

    APART void slope(const Keys& keys, int count, const float* value, const Sizes& sizes) {
        Base::dots(keys, count, value, sizes.value_step, sizes.value, d_columns, [&](int j, int n, uint32_t lanes, vec dot) {
            vec s = load(this->scores + j * WIDTH + n * LANES) * (dot - delta[n]);
            store(slopes + j * WIDTH + n * LANES, named(lanes) ? s : vec{});
        });
    }

    // into[key] += sum over lanes of weights[key][lane] * rows[lane]
    static APART void spread(float* into, int width, const float* weights, const Keys& keys, int count, const float* rows) {
        int j = 0;
        for (; j + GROUP <= count; j += GROUP) spread_some<GROUP>(into, width, weights, keys, j, rows);
        for (; j < count; j++) spread_some<1>(into, width, weights, keys, j, rows);
    }

    template <int COUNT>
    static INLINE void spread_some(float* into, int width, const float* weights, const Keys& keys, int j,
                                   const float* rows) {
        uint32_t any = 0;
        for (int i = 0; i < COUNT; i++) any |= keys.lanes[j + i] & (uint32_t)((1ull << WIDTH) - 1);
        if (!any) return;
        const int from = __builtin_ctz(any), to = 32 - __builtin_clz(any);
        const float* weight = weights + j * WIDTH;
        int c = 0;
        for (; c + MOST * LANES <= width; c += MOST * LANES)
            spread_rows<COUNT, MOST>(into + c, width, keys.token + j, weight, WIDTH, from, to, rows + c);
        for (; c < width; c += LANES)
            spread_rows<COUNT, 1>(into + c, width, keys.token + j, weight, WIDTH, from, to, rows + c);
    }
};

// Rows of `dim` floats times `scale`, one per lane; zeros behind them and for lanes without a row.
template <int NV>
static void gather_rows(float* rows, const float* const* lane, int dim, int step, float scale) {
    std::memset(rows, 0, sizeof(float) * LANES * NV * step);
    for (int i = 0; i < LANES * NV; i++)
        for (int d = 0; lane[i] && d < dim; d++) rows[i * step + d] = lane[i][d] * scale;
}
