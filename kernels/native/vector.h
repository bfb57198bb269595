// Vectors of LANES floats (16 with AVX-512, 8 with AVX2, 4 elsewhere) and the two products that attention is made of.
// Compiler vector types, so that one source serves every instruction set; LANES comes from the build.
#pragma once
#include <cstdint>
#include <limits>

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

static INLINE vec load(const float* p) { return *(const loose*)p; }
static INLINE void store(float* p, vec v) { *(loose*)p = v; }
static INLINE vec splat(float x) { return x - vec{}; }
static INLINE vec larger(vec a, vec b) { return b > a ? b : a; }  // a NaN in b is passed over

// Which lanes a bit mask names.
static INLINE ivec named(uint32_t bits) {
    ivec bit;
    UNROLL for (int i = 0; i < LANES; i++) bit[i] = 1 << i;
    return (((int32_t)bits - ivec{}) & bit) != 0;
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

// dots[key][lane] = sum over d of row[key][d] * columns[d][lane]; rows stay where they are, columns are [dim, LANES * NV].
template <int KEYS, int NV>
static INLINE void dot_rows(const float* const* row, const float* columns, int dim, vec (&dots)[KEYS][NV]) {
    const float* r[KEYS];
    UNROLL for (int j = 0; j < KEYS; j++) {
        r[j] = row[j];
        UNROLL for (int n = 0; n < NV; n++) dots[j][n] = vec{};
    }
    for (int d = 0; d < dim; d++) {
        vec c[NV];
        UNROLL for (int n = 0; n < NV; n++) c[n] = load(columns + (d * NV + n) * LANES);
        UNROLL for (int j = 0; j < KEYS; j++) {
            float x = r[j][d];
            UNROLL for (int n = 0; n < NV; n++) dots[j][n] += x * c[n];
        }
    }
}

// out[lane] += sum over keys of weight[key][lane] * row[key], for ROWS lanes and COLUMNS vectors of every row.
template <int ROWS, int COLUMNS>
static INLINE void add_rows(float* out, int width, const float* weight, int lanes, int count, const float* base,
                            const int64_t* offset) {
    vec sum[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sum[i][c] = load(out + i * width + c * LANES);
    for (int j = 0; j < count; j++) {
        vec x[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) x[c] = load(base + offset[j] + c * LANES);
        UNROLL for (int i = 0; i < ROWS; i++) {
            float w = weight[j * lanes + i];
            UNROLL for (int c = 0; c < COLUMNS; c++) sum[i][c] += w * x[c];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int c = 0; c < COLUMNS; c++) store(out + i * width + c * LANES, sum[i][c]);
}
