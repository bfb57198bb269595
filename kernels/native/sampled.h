// Attention within the windows of a map, whose keys and values are read between its tokens: each window and head has points
// of its own, as many as a window has tokens. Nothing of the size of the map is copied; a window stays in the cache.
#pragma once
#include "few.h"

struct Sampled {
    Rows q, key, value;   // token (y, x) of a head is at(batch, head, 0, y, x)
    const float* points;  // [2, batch, windows, heads, tokens]: x and y in tokens of the map, windows row by row
    const float* bias;    // [windows of all maps or 1, heads, tokens, tokens], added to scaled scores; null for none
    int64_t biases;       // 1 where all windows share it, else 0
    float* out;           // [batch, height, width, heads, value dim]
    int64_t batch, heads, height, width, size, key_dim, value_dim, threads;  // size: tokens per side of a window
    float scale;
};

class SampledForward {
    const Sampled& call;
    const int64_t tokens = call.size * call.size, down = call.height / call.size, across = call.width / call.size;
    const int64_t pitch = (tokens + 2 * LANES - 1) / LANES * LANES;  // floats of a query's scores, of a channel of the keys
    const int64_t key_step = whole(call.key_dim), value_step = whole(call.value_dim);
    Scratch scratch;
    float *keys = scratch.floats(LANES * key_step), *columns = scratch.floats(call.key_dim * pitch);
    float *values = scratch.floats(tokens * value_step), *scores = scratch.floats(4 * pitch);
    float* rest = scratch.floats(4 * value_step);  // output rows that are no whole vectors
    std::vector<const float*> value_row;

    static int64_t whole(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

  public:
    explicit SampledForward(const Sampled& call) : call(call) {
        for (int64_t t = 0; t < tokens; t++) value_row.push_back(values + t * value_step);
    }

    void attend(int64_t batch, int64_t window, int64_t head) {
        const int64_t top = window / across * call.size, left = window % across * call.size;
        const int64_t all = call.batch * down * across * call.heads * tokens;
        const int64_t place = (batch * down * across + window) * call.heads + head;
        const float *x = call.points + place * tokens, *y = x + all;
        for (int64_t t = 0; t < tokens; t += LANES) {
            const float* row[LANES] = {};
            for (int64_t i = 0; i < LANES && t + i < tokens; i++) {
                read(call.key, batch, head, x[t + i], y[t + i], keys + i * key_step, call.key_dim);
                read(call.value, batch, head, x[t + i], y[t + i], values + (t + i) * value_step, call.value_dim);
                row[i] = keys + i * key_step;
            }
            transpose_rows(columns + t, pitch, row, (int)call.key_dim, 1);
        }
        const float* bias = call.bias ? call.bias + (call.biases ? head : place) * tokens * tokens : nullptr;
        for (int64_t i = 0; i < tokens; i += 4)
            with_constant<4>((int)(tokens - i), [&](auto n) INLINE_LAMBDA {
                const float* q[n];
                float by[n], *row[n], *out[n];
                for (int j = 0; j < n; j++) {
                    const int64_t down = top + (i + j) / call.size, right = left + (i + j) % call.size;
                    q[j] = call.q.at(batch, head, 0, down, right);
                    out[j] = call.out + (((batch * call.height + down) * call.width + right) * call.heads + head) * call.value_dim;
                    row[j] = call.value_dim % LANES ? rest + j * value_step : out[j];
                }
                for (int64_t t = 0; t < tokens; t += 2 * LANES) {
                    auto dot = tokens - t > LANES ? dot_columns<n, 2> : dot_columns<n, 1>;
                    dot(q, columns + t, pitch, (int)call.key_dim, call.scale * LOG2E, scores + t, pitch);
                }
                for (int j = 0; bias && j < n; j++) add(scores + j * pitch, bias + (i + j) * tokens);
                weigh_scores<n>(scores, pitch, (int)tokens, by, nullptr, 0);
                for (int c = 0; c < value_step; c += MOST * LANES)
                    with_constant<MOST>((int)(value_step - c) / LANES, [&](auto vectors) INLINE_LAMBDA {
                        weigh_values<n, vectors>(row, scores, pitch, by, value_row.data(), c, (int)tokens);
                    });
                for (int j = 0; j < n && row[j] != out[j]; j++) std::memcpy(out[j], row[j], sizeof(float) * call.value_dim);
            });
    }

  private:
    // The row between the tokens around a place, zeros beyond the map, up to whole vectors.
    void read(const Rows& rows, int64_t batch, int64_t head, float x, float y, float* into, int64_t dim) const {
        const bool near = x > -1 && x < call.width && y > -1 && y < call.height;
        const int64_t left = near ? (int64_t)std::floor(x) : 0, above = near ? (int64_t)std::floor(y) : 0;
        const float right = x - left, below = y - above;
        const float* from[4];
        float weight[4];
        int count = 0;
        for (int corner = 0; near && corner < 4; corner++) {
            const int64_t i = above + corner / 2, j = left + corner % 2;
            if (i < 0 || i >= call.height || j < 0 || j >= call.width) continue;
            from[count] = rows.at(batch, head, 0, i, j);
            weight[count++] = (corner / 2 ? below : 1 - below) * (corner % 2 ? right : 1 - right);
        }
        const float none = x == x && y == y ? 0 : std::numeric_limits<float>::quiet_NaN();
        for (int64_t c = 0; c < dim; c += LANES) {
            vec sum = splat(none);
            for (int k = 0; k < count; k++) {
                float part[LANES] = {};
                if (c + LANES > dim) std::memcpy(part, from[k] + c, sizeof(float) * (dim - c));
                sum += weight[k] * load(c + LANES > dim ? part : from[k] + c);
            }
            store(into + c, sum);
        }
    }

    void add(float* score, const float* bias) const {
        int64_t t = 0;
        for (; t + LANES <= tokens; t += LANES) store(score + t, load(score + t) + load(bias + t) * LOG2E);
        for (; t < tokens; t++) score[t] += bias[t] * LOG2E;
    }
};

static int forward_sampled(const Sampled& call) {
    const int64_t windows = call.height / call.size * (call.width / call.size), maps = call.batch * windows;
    return share((int)call.threads, maps * call.heads, call.heads, [&](auto next) {
        SampledForward forward(call);
        for (int64_t job = next(); job >= 0; job = next())
            forward.attend(job / call.heads / windows, job / call.heads % windows, job % call.heads);
    });
}
