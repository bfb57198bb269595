// What crosses the C interface, and the threads that share a call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "tile.h"

// One axis of a separable pattern, cut into tiles of queries. Tiles that look alike, keys and masks relative to their
// first key, are of one kind.
struct Side {
    int32_t tiles, lanes, kinds;
    const int32_t *query;  // [tiles, lanes] coordinates, -1 for none
    const int32_t *kind;   // [tiles]
    const int32_t *first;  // [tiles] coordinate of the first key
    const int32_t *start;  // [kinds + 1] into the next two
    const int32_t *key;    // coordinates of the keys, relative to the first
    const uint32_t *seen;  // which lanes of a tile see the key, as far as this axis goes
};

// Lanes of a tile are numbered [group, axis 0, axis 1, axis 2]; there are at most LANES * vectors. With `radius` above 0 a
// query sees only the keys less than that far away on the last two axes.
struct Boxes {
    int32_t vectors, group, radius;
    Side side[3];
};

// Rows of queries and the blocks of keys they see, as Lists in patterns/blocks.py. `mask` numbers the blocks that need a
// test, -1 for none; `bits[number][query / 32][key]` says which of 32 queries see a key.
struct Blocks {
    int32_t vectors, query, key, rows, slots;
    int64_t batch, head;  // steps in rows
    const int32_t *index, *count, *mask;
    const uint32_t* bits;
};

// One axis of a separable pattern without tiles of keys: the query at position p is coordinate order[p] and sees the keys at
// positions low[p] to high[p] - 1; tile t has the queries from cut[t] to cut[t + 1] - 1.
struct Axis {
    int32_t tiles;
    const int32_t *order, *low, *high, *cut;
};

// Where rows of floats are, one per token and head: the first, and the steps to the others in floats.
struct Rows {
    const float* first;
    int64_t batch, axis[3], head;

    const float* at(int64_t b, int64_t h, int64_t i, int64_t j, int64_t k) const {
        return first + b * batch + h * head + i * axis[0] + j * axis[1] + k * axis[2];
    }
};

// Keys and values where the caller has them, and the axes; on the first one tiles are single queries, and on the last one
// positions are coordinates. See lines.h.
struct Lines {
    Rows key, value;
    Axis axis[3];
};

// Tokens count over the grid; extra tokens follow them in `key` and `value`, [batch, kv_heads, tokens + extra, step].
struct Call {
    int32_t batch, kv_heads, group, threads, grid[3], extra;
    Sizes sizes;
    float scale;
    Rows q;
    const float *key, *value;
    const uint8_t* visible;  // [batch, extra], or null when all extra tokens are
    float* out;              // [batch, tokens, heads, value]
    float* lse;              // [batch, tokens, heads], or null
    // A relative bias, [heads, entries], added to scaled scores: the entry of a pair is place[key] - place[query] + middle.
    // Null without.
    const float* bias;
    const int32_t* place;  // [tokens]
    int64_t entries, middle, step[2];  // the last: from one position along axis 0, or 1, to the next
    // For the backward, which reads out and lse: gradients in, [batch, tokens, heads, value] and [batch, tokens, heads] or
    // null; gradients out, [batch, tokens, heads, key], and zeros like key, value and bias to add to.
    const float *d_out, *d_lse;
    float *d_q, *d_key, *d_value, *d_bias;

    int64_t tokens() const { return (int64_t)grid[0] * grid[1] * grid[2]; }
    int64_t rows() const { return tokens() + extra; }
};

// Where rows of floats are, one per token and head: the first, and the steps to the others in floats.
struct Tokens {
    const float* first;
    int64_t batch, token, head;
};

// Scans over the tokens, ahead and back; see scan.h. Their results are added, and a direction without gates is left out. Rows
// of gates are natural logarithms of them; or with a `root` r the gates are sigmoid(row)^(1 / r).
struct Scan {
    int64_t batch, tokens, heads, key, value, threads;
    Tokens q, k, v, gates[2];
    float* out;  // [batch, tokens, heads, value]
    float scale, root;
};

// Memory of one thread, aligned for vectors and not cleared.
class Scratch {
    std::vector<void*> held;

  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        for (void* at : held) std::free(at);
    }
    float* floats(size_t count) {
        held.push_back(nullptr);
        held.back() = std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
        if (!held.back()) throw std::bad_alloc();
        return (float*)held.back();
    }
};

// The threads of torch, as its OpenMP runtime starts them: those wait for more work by spinning, so that others would have
// to share their processors with them. Null where torch has another runtime.
typedef void (*Team)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
inline Team team = nullptr;

// Run `work(next)` in up to `threads` threads; `next()` hands out the numbers below `jobs` once each, in runs of `run`.
// Returns 0, or 1 when memory ran out in any of them.
template <class Work>
int share(int threads, int64_t jobs, int64_t run, Work work) {
    std::atomic<int64_t> given{0};
    std::atomic<int> failed{0};
    auto body = [&] {
        int64_t at = 0, stop = 0;
        auto next = [&]() -> int64_t {
            if (at == stop) at = given.fetch_add(run), stop = at + run;
            return at < jobs ? at++ : -1;
        };
        try {
            work(next);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    const int64_t most = std::min<int64_t>(threads, (jobs + run - 1) / run);
    if (team && most > 1) {
        team([](void* data) { (*(decltype(body)*)data)(); }, &body, (unsigned)most, 0);
        return failed;
    }
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < most; i++) others.emplace_back(body);
    } catch (const std::system_error&) {  // no more threads to be had: fewer do it
    }
    body();
    for (auto& other : others) other.join();
    return failed;
}
