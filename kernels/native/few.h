// A third form of the forward, for block lists whose blocks have few queries: lanes are keys, as in lines.h, because so few
// queries would leave most lanes of a tile empty. Keys and values are read where the caller has them.
#pragma once
#include "call.h"

constexpr int FEW = 8;  // queries in a block, at most

// Token t of the grid is at first + batch * ... + t * axis[2]; rows of values are whole vectors, and no block needs a test.
struct FewBlocks {
    Blocks blocks;
    Rows key, value;
};

// row[i] = by[i] * sum over keys of weight[i][key] * value[key], for N queries and C vectors.
template <int N, int C>
static INLINE void weigh_values(float* const* row, const float* weight, int64_t pitch, const float* by,
                                const float* const* value, int at, int count) {
    vec sum[N][C];
    UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int c = 0; c < C; c++) sum[i][c] = vec{};
    for (int j = 0; j < count; j++) {
        vec x[C];
        UNROLL for (int c = 0; c < C; c++) x[c] = load(value[j] + at + c * LANES);
        UNROLL for (int i = 0; i < N; i++) {
            const float p = weight[i * pitch + j];
            UNROLL for (int c = 0; c < C; c++) sum[i][c] += p * x[c];
        }
    }
    UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int c = 0; c < C; c++) store(row[i] + at + c * LANES, sum[i][c] * by[i]);
}

// score[i][key] = scale * product of query[i] with the keys, whose channels are `step` floats apart.
template <int N, int V>
static INLINE void dot_columns(const float* const* query, const float* columns, int64_t step, int dim, float scale,
                               float* score, int64_t pitch) {
    vec sum[N][V];
    UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int n = 0; n < V; n++) sum[i][n] = vec{};
    for (int d = 0; d < dim; d++, columns += step) {
        vec x[V];
        UNROLL for (int n = 0; n < V; n++) x[n] = load(columns + n * LANES);
        UNROLL for (int i = 0; i < N; i++)
            UNROLL for (int n = 0; n < V; n++) sum[i][n] += query[i][d] * x[n];
    }
    UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int n = 0; n < V; n++) store(score + i * pitch + n * LANES, sum[i][n] * scale);
}

// Scores of N queries to weights; `by` is what to multiply their sums with, `lse` gets their log-sum-exp, if wanted.
template <int N>
static INLINE void weigh_scores(float* score, int64_t pitch, int count, float* by, float* lse, int64_t apart) {
    vec all[N], sum[N];
    float most[N], base[N];
    UNROLL for (int i = 0; i < N; i++) all[i] = splat(NOTHING), sum[i] = vec{};
    if (const int rest = count % LANES)  // no query sees what is behind the last key
        UNROLL for (int i = 0; i < N; i++) {
            float* last = score + i * pitch + count - rest;
            store(last, named((1u << rest) - 1) ? load(last) : splat(NOTHING));
        }
    for (int x = 0; x < count; x += LANES)
        UNROLL for (int i = 0; i < N; i++) all[i] = larger(all[i], load(score + i * pitch + x));
    UNROLL for (int i = 0; i < N; i++) most[i] = largest(all[i]), base[i] = most[i] == NOTHING ? 0 : most[i];
    for (int x = 0; x < count; x += LANES)
        UNROLL for (int i = 0; i < N; i++) {
            const vec s = load(score + i * pitch + x), p = s == NOTHING ? vec{} : exp2(s - base[i]);
            store(score + i * pitch + x, p);
            sum[i] += p;
        }
    UNROLL for (int i = 0; i < N; i++) {
        const float whole = total(sum[i]);
        by[i] = whole == 0 ? 0 : 1 / whole;
        if (lse) lse[i * apart] = whole == 0 ? NOTHING : float((most[i] + std::log2((double)whole)) * LN2);
    }
}

class FewForward {
    // Where the keys and values are that a row of blocks sees, and its queries; null behind the keys up to whole vectors.
    struct Seen {
        int64_t job = -1;
        int count, queries;
        std::vector<const float*> key, value;
        const float* query[FEW];
    };

    const Call& call;
    const FewBlocks& plan;
    const Blocks& blocks = plan.blocks;
    const int64_t heads = (int64_t)call.kv_heads * call.group, jobs = call.batch * heads * blocks.rows;
    Scratch scratch;
    int64_t pitch;  // floats of a query's scores
    float *keys, *scores;
    Seen seen[2];

  public:
    FewForward(const Call& call, const FewBlocks& plan) : call(call), plan(plan) {
        const int64_t most = std::min<int64_t>((int64_t)blocks.slots * blocks.key, call.tokens());
        pitch = (most + 2 * LANES - 1) / LANES * LANES;
        keys = scratch.floats(2 * LANES * call.sizes.key);
        scores = scratch.floats(FEW * pitch);
        for (Seen& each : seen) each.key.resize(pitch), each.value.resize(pitch);
    }

    // Have the queries of `job` attend, a row of blocks of one head; those of the next job, the same row of the next head, are
    // brought near meanwhile.
    void attend(int64_t job) {
        Seen &now = seen[job % 2], &then = seen[1 - job % 2];
        if (now.job != job) look(now, job);
        if (job + 1 < jobs) look(then, job + 1);
        const Sizes& sizes = call.sizes;
        const int64_t head = job % heads, row = job / heads % blocks.rows, batch = job / heads / blocks.rows;
        const int64_t out = (batch * call.tokens() + row * blocks.query) * heads + head;
        for (int x = 0; x < now.count; x += 2 * LANES) {
            const int vectors = now.count - x > LANES ? 2 : 1;
            for (int n = 0; n < vectors; n++)
                transpose_rows(keys + n * LANES, 2 * LANES, &now.key[x + n * LANES], sizes.key, 1);
            for (int i = 0; i < now.queries; i += 4)
                with_constant<4>(now.queries - i, [&](auto n) INLINE_LAMBDA {
                    auto dot = vectors == 2 ? dot_columns<n, 2> : dot_columns<n, 1>;
                    dot(now.query + i, keys, 2 * LANES, sizes.key, call.scale * LOG2E, scores + i * pitch + x, pitch);
                });
        }
        for (int i = 0; i < now.queries; i += 4)
            with_constant<4>(now.queries - i, [&](auto n) INLINE_LAMBDA {
                float by[4], *to[4], *lse = call.lse ? call.lse + out + i * heads : nullptr;
                weigh_scores<n>(scores + i * pitch, pitch, now.count, by, lse, heads);
                for (int j = 0; j < n; j++) to[j] = call.out + (out + (i + j) * heads) * sizes.value;
                for (int c = 0; c < sizes.value; c += MOST * LANES)
                    with_constant<MOST>((sizes.value - c) / LANES, [&](auto vectors) INLINE_LAMBDA {
                        weigh_values<n, vectors>(to, scores + i * pitch, pitch, by, now.value.data(), c, now.count);
                    });
            });
    }

  private:
    void look(Seen& at, int64_t job) {
        const int64_t head = job % heads, row = job / heads % blocks.rows, batch = job / heads / blocks.rows;
        const int64_t line = batch * blocks.batch + head * blocks.head + row, kv_head = head / call.group;
        const int64_t tokens = call.tokens(), start = row * blocks.query;
        at.job = job, at.count = 0, at.queries = (int)std::min<int64_t>(blocks.query, tokens - start);
        for (int i = 0; i < at.queries; i++) {
            at.query[i] = call.q.at(batch, head, 0, 0, start + i);
            fetch(at.query[i], call.sizes.key);
        }
        for (int32_t slot = 0; slot < blocks.count[line]; slot++) {
            const int64_t from = (int64_t)blocks.index[line * blocks.slots + slot] * blocks.key;
            const int64_t to = std::min<int64_t>(from + blocks.key, tokens);
            const float *key = plan.key.at(batch, kv_head, 0, 0, from), *value = plan.value.at(batch, kv_head, 0, 0, from);
            for (int64_t t = from; t < to; t++, at.count++) {
                at.key[at.count] = key, at.value[at.count] = value;
                fetch(key, call.sizes.key), fetch(value, call.sizes.value);
                key += plan.key.axis[2], value += plan.value.axis[2];
            }
        }
        for (int i = at.count; i % LANES; i++) at.key[i] = nullptr;
    }
};

static int forward_few(const Call& call, const FewBlocks& plan) {
    const int64_t rows = plan.blocks.rows, heads = (int64_t)call.batch * call.kv_heads * call.group;
    return share(call.threads, heads * rows, rows * call.kv_heads * call.group, [&](auto next) {
        FewForward forward(call, plan);
        for (int64_t job = next(); job >= 0; job = next()) forward.attend(job);
    });
}
