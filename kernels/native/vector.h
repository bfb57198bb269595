// Vectors of LANES floats (16 with AVX-512, 8 with AVX2, 4 elsewhere) and the two products that attention is made of.
// Compiler vector types, so that one source serves every instruction set; LANES comes from the build.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))
#define APART __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

static INLINE vec load(const float* p) { return *(const loose*)p; }
static INLINE void store(float* p, vec v) { *(loose*)p = v; }
static INLINE vec splat(float x) { return x - vec{}; }
static INLINE vec larger(vec a, vec b) { return b > a ? b : a; }  // a NaN in b is passed over

// Have a row brought near, to read or to write it soon: rows are scattered, and processors foresee only what is in a line.
static INLINE void fetch(const float* row, int dim) {
    for (int d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}
static INLINE void fetch_to_write(const float* row, int dim) {
    for (int d = 0; d < dim; d += 16) __builtin_prefetch(row + d, 1, 2);
}

// Which lanes a bit mask names.
static INLINE ivec named(uint32_t bits) {
    ivec bit;
    UNROLL for (int i = 0; i < LANES; i++) bit[i] = 1 << i;
    return (((int32_t)bits - ivec{}) & bit) != 0;
}

// Over the lanes of one vector.
static INLINE float largest(vec v) {
    UNROLL for (int step = LANES / 2; step; step /= 2) {
        ivec other;
        UNROLL for (int i = 0; i < LANES; i++) other[i] = i ^ step;
        v = larger(v, __builtin_shuffle(v, other));
    }
    return v[0];
}
static INLINE float total(vec v) {
    UNROLL for (int step = LANES / 2; step; step /= 2) {
        ivec other;
        UNROLL for (int i = 0; i < LANES; i++) other[i] = i ^ step;
        v += __builtin_shuffle(v, other);
    }
    return v[0];
}

// 2^x for x up to 127, off by less than 2e-7 of itself; below -125 it stays at 2^-125, which is no longer seen in a sum
// that holds a 1. NaN stays NaN. The polynomial is the best of its degree on [-0.5, 0.5] among those that are 1 at 0.
static INLINE vec exp2(vec x) {
    x = x < -125.0f ? splat(-125.0f) : x;
    vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest whole number
    vec f = x - (shifted - 12582912.0f);
    vec p = 0.001326472731307149f * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// Rows to columns: the blocks off the diagonal change places, for blocks of 1, 2, 4, ...
static INLINE void transpose(vec (&row)[LANES]) {
    UNROLL for (int step = 1; step < LANES; step *= 2) {
        ivec low, high;
        UNROLL for (int i = 0; i < LANES; i++) {
            low[i] = i & step ? LANES + i - step : i;
            high[i] = i & step ? LANES + i : i + step;
        }
        UNROLL for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                vec a = row[i], b = row[i + step];
                row[i] = __builtin_shuffle(a, b, low);
                row[i + step] = __builtin_shuffle(a, b, high);
            }
    }
}

// dots[key][lane] = sum over d of row[key][d] * columns[d][lane], for KEYS rows that stay where they are; a row of
// columns is `step` floats long. With one vector per key, odd and even d are summed apart: more sums are under way.
template <int KEYS, int NV>
static INLINE void dot_rows(const float* const (&row)[KEYS], const float* columns, int step, int dim,
                            vec (&dots)[KEYS][NV]) {
    constexpr int SETS = NV == 1 && LANES == 16 ? 2 : 1;
    vec sum[SETS][KEYS][NV];
    UNROLL for (int a = 0; a < SETS; a++)
        UNROLL for (int j = 0; j < KEYS; j++)
            UNROLL for (int n = 0; n < NV; n++) sum[a][j][n] = vec{};
    auto add = [&](int a, int d) INLINE_LAMBDA {
        vec c[NV];
        UNROLL for (int n = 0; n < NV; n++) c[n] = load(columns + d * step + n * LANES);
        UNROLL for (int j = 0; j < KEYS; j++) {
            const float x = row[j][d];
            UNROLL for (int n = 0; n < NV; n++) sum[a][j][n] += x * c[n];
        }
    };
    int d = 0;
    for (; d + SETS <= dim; d += SETS)
        UNROLL for (int a = 0; a < SETS; a++) add(a, d + a);
    for (; d < dim; d++) add(0, d);
    UNROLL for (int j = 0; j < KEYS; j++)
        UNROLL for (int n = 0; n < NV; n++) dots[j][n] = SETS == 2 ? sum[0][j][n] + sum[SETS - 1][j][n] : sum[0][j][n];
}

// Call `work` with a constant for `count`, which is 1 to MOST_COUNT.
template <int MOST_COUNT, class Work>
static INLINE void with_constant(int count, Work work) {
    if constexpr (MOST_COUNT > 1)
        if (count < MOST_COUNT) return with_constant<MOST_COUNT - 1>(count, work);
    work(std::integral_constant<int, MOST_COUNT>{});
}

// The same with keys in the lanes: products of `count` queries with two vectors of keys, written to to[query] + at and
// `then` floats on. A channel of the queries is `apart` floats, one of the keys `step`.
static APART void dot_pairs(int count, const float* columns, int apart, const float* const (&key)[2], int64_t step, int dim,
                            float* const* to, int64_t at, int64_t then) {
    constexpr int PAIRED = LANES == 16 ? 12 : 6;  // queries whose sums are kept in registers
    for (int parts = (count + PAIRED - 1) / PAIRED; parts > 0; parts--) {
        const int some = (count + parts - 1) / parts;
        with_constant<PAIRED>(some, [&](auto constant) INLINE_LAMBDA {
            constexpr int N = decltype(constant)::value;
            const float *a = key[0], *b = key[1], *q = columns;
            vec sum[N][2];
            UNROLL for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = vec{};
            for (int d = 0; d < dim; d++, a += step, b += step, q += apart) {
                const vec x = load(a), y = load(b);
                UNROLL for (int i = 0; i < N; i++) sum[i][0] += q[i] * x, sum[i][1] += q[i] * y;
            }
            UNROLL for (int i = 0; i < N; i++) store(to[i] + at, sum[i][0]), store(to[i] + at + then, sum[i][1]);
        });
        count -= some, columns += some, to += some;
    }
}

// out[lane] += sum over keys of weight[key][lane] * row[key], for ROWS lanes and COLUMNS vectors of every row.
template <int ROWS, int COLUMNS>
static INLINE void add_rows(float* out, int width, const float* weight, int lanes, const float* base,
                            const int32_t* token, int count) {
    vec sum[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sum[i][c] = load(out + i * width + c * LANES);
    for (int j = 0; j < count; j++) {
        const float* row = base + (int64_t)token[j] * width;
        vec x[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) x[c] = load(row + c * LANES);
        UNROLL for (int i = 0; i < ROWS; i++) {
            float w = weight[j * lanes + i];
            UNROLL for (int c = 0; c < COLUMNS; c++) sum[i][c] += w * x[c];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int c = 0; c < COLUMNS; c++) store(out + i * width + c * LANES, sum[i][c]);
}

// into[key] += sum over lanes of weight[key][lane] * rows[lane], for KEYS keys and COLUMNS vectors of every row.
template <int KEYS, int COLUMNS>
static INLINE void spread_rows(float* into, int width, const int32_t* token, const float* weight, int lanes, int from,
                               int to, const float* rows) {
    vec sum[KEYS][COLUMNS];
    UNROLL for (int j = 0; j < KEYS; j++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sum[j][c] = load(into + (int64_t)token[j] * width + c * LANES);
    for (int i = from; i < to; i++) {
        vec x[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) x[c] = load(rows + (int64_t)i * width + c * LANES);
        UNROLL for (int j = 0; j < KEYS; j++) {
            const float w = weight[j * lanes + i];
            UNROLL for (int c = 0; c < COLUMNS; c++) sum[j][c] += w * x[c];
        }
    }
    UNROLL for (int j = 0; j < KEYS; j++)
        UNROLL for (int c = 0; c < COLUMNS; c++) store(into + (int64_t)token[j] * width + c * LANES, sum[j][c]);
}
