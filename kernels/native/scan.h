// Scans over the tokens that forget by gates: h_t = gate_t h_(t-1) + k_t v_t^T with a gate per row of h, read by q_t h_t.
#pragma once
#include "call.h"

constexpr int SPAN = 32;                   // tokens that are brought side by side, in the order of the scan
constexpr int HELD = LANES == 16 ? 8 : 4;  // rows of a state that are in registers,
constexpr int BESIDE = 2;                  // with so many vectors of each

// log2(1 + 2^x) for x up to 0, off by less than 4e-7.
static INLINE vec soft(vec x) {
    const vec e = exp2(x);
    vec p = 0.015529903583228588f * e - 0.07955768704414368f;
    p = p * e + 0.1942942589521408f;
    p = p * e - 0.32590192556381226f;
    p = p * e + 0.4735533893108368f;
    p = p * e - 0.7205854654312134f;
    p = p * e + 1.442667841911316f;
    return p * e;
}

// One job: some columns of the values of a head, in one direction. What is missing to whole blocks is 0 and adds nothing.
struct Scanner {
    const Scan& call;
    const int keys = int((call.key + LANES - 1) / LANES * LANES), values;
    Scratch scratch;
    float *q = scratch.floats(SPAN * keys), *k = scratch.floats(SPAN * keys);
    float *shut = scratch.floats(SPAN * keys), *gates = scratch.floats(SPAN * keys);
    float *v = scratch.floats(SPAN * values), *out = scratch.floats(SPAN * values);
    float* state = scratch.floats(keys * values);

    // `values`: the most columns of a job, in whole vectors.
    Scanner(const Scan& call, int values) : call(call), values(values) {
        for (float* rows : {q, k, shut}) std::memset(rows, 0, sizeof(float) * SPAN * keys);
        std::memset(v, 0, sizeof(float) * SPAN * values);
    }

    // Columns from `column` on, `width` of them; `back` from the last token to the first. Adds to what is there, or not.
    void work(int64_t batch, int64_t head, int column, int width, bool back, bool add) {
        const int64_t step = back ? -1 : 1;
        std::memset(state, 0, sizeof(float) * keys * values);
        for (int64_t done = 0; done < call.tokens; done += SPAN) {
            const int count = (int)std::min<int64_t>(SPAN, call.tokens - done);
            const int64_t first = back ? call.tokens - 1 - done : done;
            auto bring = [&](float* to, int apart, const Tokens& rows, int from, int dim) INLINE_LAMBDA {
                const float* row = rows.first + batch * rows.batch + head * rows.head + first * rows.token + from;
                for (int i = 0; i < count; i++, to += apart, row += step * rows.token) {
                    int d = 0;
                    for (; d + LANES <= dim; d += LANES) store(to + d, load(row + d));
                    for (; d < dim; d++) to[d] = row[d];
                }
            };
            bring(q, keys, call.q, 0, call.key);
            bring(k, keys, call.k, 0, call.key);
            bring(shut, keys, call.gates[back], 0, call.key);
            bring(v, values, call.v, column, width);
            if (call.root)
                for (int i = 0; i < count * keys; i += LANES) store(gates + i, open<true>(load(shut + i)));
            else
                for (int i = 0; i < count * keys; i += LANES) store(gates + i, open<false>(load(shut + i)));
            std::memset(out, 0, sizeof(float) * count * values);
            int c = 0;
            for (; c + BESIDE * LANES <= width; c += BESIDE * LANES) pass<BESIDE>(count, c);
            for (; c < width; c += LANES) pass<1>(count, c);
            for (int i = 0; i < count; i++) {
                const int64_t row = (batch * call.tokens + first + step * i) * call.heads + head;
                float *to = call.out + row * call.value + column, *sum = out + i * values;
                for (c = 0; c + LANES <= width; c += LANES)
                    store(to + c, load(sum + c) * call.scale + (add ? load(to + c) : vec{}));
                for (; c < width; c++) to[c] = sum[c] * call.scale + (add ? to[c] : 0);
            }
        }
    }

    // What stands for gates to gates: 0 from about 1e-38 on, where exp2 stops.
    template <bool SIGMOID>
    INLINE vec open(vec x) {
        x *= LOG2E;
        if constexpr (SIGMOID) {
            const vec low = x < 0 ? x : vec{};
            x = (low - soft(-larger(x, -x))) * (1 / call.root);
        }
        return x < -125.0f ? vec{} : exp2(x);
    }

    // Some columns of the state past all tokens of a span.
    template <int COLUMNS>
    APART void pass(int count, int column) {
        const int64_t keys = this->keys, values = this->values;
        for (int row = 0; row < call.key; row += HELD) {
            const float *a = q + row, *b = k + row, *g = gates + row, *x = v + column;
            float *held = state + row * values + column, *into = out + column;
            vec h[HELD][COLUMNS];
            UNROLL for (int r = 0; r < HELD; r++)
                UNROLL for (int c = 0; c < COLUMNS; c++) h[r][c] = load(held + r * values + c * LANES);
            for (int i = 0; i < count; i++, a += keys, b += keys, g += keys, x += values, into += values) {
                vec value[COLUMNS], sum[COLUMNS];
                UNROLL for (int c = 0; c < COLUMNS; c++)
                    value[c] = load(x + c * LANES), sum[c] = load(into + c * LANES);
                UNROLL for (int r = 0; r < HELD; r++)
                    UNROLL for (int c = 0; c < COLUMNS; c++) {
                        h[r][c] = g[r] * h[r][c] + b[r] * value[c];
                        sum[c] += a[r] * h[r][c];
                    }
                UNROLL for (int c = 0; c < COLUMNS; c++) store(into + c * LANES, sum[c]);
            }
            UNROLL for (int r = 0; r < HELD; r++)
                UNROLL for (int c = 0; c < COLUMNS; c++) store(held + r * values + c * LANES, h[r][c]);
        }
    }
};

// Heads are shared by the threads, and where there are few also the columns of their values.
static int scan(const Scan& call) {
    const int64_t heads = call.batch * call.heads, vectors = (call.value + LANES - 1) / LANES;
    if (!heads || !vectors) return 0;
    const int64_t parts = std::min<int64_t>((call.threads + heads - 1) / heads, vectors);
    return share(call.threads, heads * parts, 1, [&](auto next) {
        Scanner scanner(call, int((vectors + parts - 1) / parts * LANES));
        for (int64_t job = next(); job >= 0; job = next()) {
            const int64_t head = job / parts, part = job % parts;
            const int from = int(vectors * part / parts * LANES);
            const int to = std::min<int>(int(vectors * (part + 1) / parts * LANES), call.value);
            for (const bool back : {false, true})
                if (call.gates[back].first)
                    scanner.work(head / call.heads, head % call.heads, from, to - from, back, back && call.gates[0].first);
        }
    });
}
