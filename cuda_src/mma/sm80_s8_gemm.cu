// y = sum over terms of (scale_x · scale_w) · (codes_x · codes_w) + bias, on tensor cores of sm_80 and
// later. A term is an input segment or, with DUAL, one polarity of a segment; where weights have scales
// for groups of columns, the same of a group. What follows calls either one a granule.
//
// A block makes a BM x BN tile of y. Tiles of 64 columns of K (32 of 16-bit values) come in STAGES buffers ahead
// of the product; a warp multiplies its part, 16x8x32 at a time. Where K crosses the end of a granule the
// sums are scaled into float ones and start over. Nothing but y is written.
//
// Fixed when compiled:
//   FORMAT      0 int8, 1 int8 with packed int4 weights, 2 E4M3 (sm_89 and later);
//               x of 16 bits without a scale: 3 with int8 weights, 4 with packed int4 ones
//   HALF        with FORMAT 3 and 4: x is float16, not bfloat16
//   OUTPUT      0 bfloat16, 1 float16, 2 float32
//   DUAL        the sign of a code of x selects its scale
//   SEGMENTED   granules: 0 one, 1 input segments, 2 groups of columns of w, 3 groups in more than one segment
//   SHORT       no granule has more than 256 columns
//   LOW_RANK    y += t · upᵀ before the bias: 0 no, 1 of bfloat16, 2 of float16
//   RESIDUAL    y = residual + gate · (the above)
//   BM BN       rows and columns of a tile; WM WN: of a warp's part
//   STAGES      buffers
#include "common/memory.cuh"
#include "common/numbers.cuh"
#include "common/output.cuh"
#include "mma/e4m3.cuh"
#include "mma/float16.cuh"
#include "mma/int4.cuh"
#include "mma/int8.cuh"

#define FLOATS (FORMAT >= 3)
#define NIBBLES (FORMAT == 1 || FORMAT == 4)
#define BK 64                      // bytes of a row of x in a stage
#define STEP (FLOATS ? 32 : 64)    // columns that these are
#define BW (STEP >> NIBBLES)       // bytes of a row of w
#define THREADS (BM / WM * (BN / WN) * 32)
#define TILES_M (WM / 16)
#define TILES_N (WN / 8)
#define PATHS (DUAL ? 2 : 1)
#define GROUPED (SEGMENTED >= 2)
#define STAGE_BYTES (BM * BK + BN * BW)
// Two blocks on a multiprocessor are worth having, but not where they cost spills.
#if SEGMENTED || FLOATS || DUAL && (FORMAT == 1 || LOW_RANK) || WM * WN > 2048 || FORMAT == 2 && BM == 16
#define BOUNDS __launch_bounds__(THREADS, 1)
#else
#define BOUNDS __launch_bounds__(THREADS)
#endif

// Where 16 bytes of a row lie: its chunks trade places with those of other rows, so that eight rows read at one
// chunk touch all 32 banks once; and so do, for reads of 8 bytes, four rows read at two.
template <int row_bytes> SQ_INLINE int swizzled(int row, int chunk) {
    const int turn = row_bytes == 16   ? 0
                     : row_bytes == 32 ? row >> 2 & 1
                     : BW == 32        ? (row & 2) | (row >> 2 & 1)
                                       : row >> 1 & 3;
    return row * row_bytes + ((chunk ^ turn) << 4);
}

// One tile of rows, from global to shared memory. Rows that do not exist become zero, and so does, if it is
// `ragged`, what lies behind the end of a row.
template <int rows, int row_bytes, bool ragged> SQ_INLINE void load_tile(
    uint8* to, const void* from, int first, int last, int at, int end) {
#pragma unroll
    for (int i = threadIdx.x; i < rows * (row_bytes / 16); i += THREADS) {
        const int row = i / (row_bytes / 16), chunk = i % (row_bytes / 16);
        const bool exists = first + row < last && (!ragged || at + chunk * 16 < end);
        const int64 source = (int64)(exists ? first + row : 0) * end + at + chunk * 16;
        copy16_async(to + swizzled<row_bytes>(row, chunk), (const uint8*)from + source, exists ? 16 : 0);
    }
}

SQ_INLINE void store_pair(void* y, int64 at, float first, float second, bool both) {
#if OUTPUT == 2
    float* to = (float*)y + at;
    to[0] = first;
    if (both) to[1] = second;
#else
    uint32 pair = OUTPUT == 1 ? floats_to_halfx2(first, second) : floats_to_bfloat16x2(first, second);
    uint16* to = (uint16*)y + at;
    if (both && at % 2 == 0) *(uint32*)to = pair;
    else {
        to[0] = (uint16)pair;
        if (both) to[1] = (uint16)(pair >> 16);
    }
#endif
}

// What tensor cores sum up, and from where on. Sums of up to 256 products of codes have 22 bits and a sign: counted from
// the bits of 1.5 · 2²³ on they are the low bits of a float already, and one subtraction makes them a number of
// their own, where a conversion would take four times as long.
#if FORMAT >= 2
typedef float Sum;
#define START 0.f
SQ_INLINE float to_float(float sum) { return sum; }
#else
typedef int Sum;
#define START (SHORT ? 0x4b400000 : 0)
SQ_INLINE float to_float(int sum) { return SHORT ? __fsub_rn(__uint_as_float((uint32)sum), SQ_ROUNDER) : __int2float_rn(sum); }
#endif

// The part of y that a warp makes: sums of codes, of the groups of a segment so far, and the scaled total.
struct Sums {
    Sum codes[PATHS][TILES_M][TILES_N][4];
#if GROUPED
    float within[PATHS][TILES_M][TILES_N][4];
#endif
    float total[TILES_M][TILES_N][4];
};

SQ_INLINE void clear(Sums& sums) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int p = 0; p < PATHS; ++p) {
                    sums.codes[p][m][n][i] = START;
#if GROUPED
                    sums.within[p][m][n][i] = 0.f;
#endif
                }
                sums.total[m][n][i] = 0.f;
            }
}

// The rows and columns of a thread's values in y: value i of tile (m, n) is in row 16m + 8(i / 2) and
// column 8n + i % 2 from here.
struct Place { int row, column, M, N; };

// The scales of a granule, in memory.
struct Granule {
    bool two;  // the sign of a code selects
    const float *x, *w;
    int tokens;
};

SQ_INLINE float row_scale(const Granule& of, int path, int row, int M) {
    if (FLOATS) return 1.f;
    return row < M ? of.x[(int64)path * of.tokens + (of.tokens > 1 ? row : 0)] : 0.f;
}
SQ_INLINE float column_scale(const Granule& of, int column, int N) { return column < N ? of.w[column] : 0.f; }

struct ScaleTables {
    const float* x;       // (segments * PATHS, M), or with tokens = 1 (…, 1)
    const float* w;       // (granules or 1, N)
    const int* duals;     // (segments,) 1 where the sign matters; or null: everywhere
    const int* segments;  // (granules,) the segment of each; or null: granules are segments
    int tokens, w_stride;
};

SQ_INLINE Granule granule_at(const ScaleTables& tables, int index) {
    const int segment = SEGMENTED && tables.segments ? tables.segments[index] : index;
    return {DUAL && (!tables.duals || tables.duals[segment]), tables.x + (int64)segment * PATHS * tables.tokens,
            tables.w + (int64)index * tables.w_stride, tables.tokens};
}

#if GROUPED
// Adds a group to those of its segment and starts its sums over. The scales of x wait for the end of the segment.
template <class OfColumn> SQ_INLINE void end_group(Sums& sums, bool two, OfColumn of_column) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int p = 0; p < PATHS; ++p) {
                    if (p && !two) continue;
                    float& to = sums.within[p][m][n][i];
                    to = fmaf(to_float(sums.codes[p][m][n][i]), of_column(n, i % 2), to);
                    sums.codes[p][m][n][i] = START;
                }
}

template <class OfRow> SQ_INLINE void end_segment(Sums& sums, bool two, OfRow of_row) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int p = 0; p < PATHS; ++p) {
                if (p && !two) continue;
                const float x = of_row(p, m, half);
#pragma unroll
                for (int n = 0; n < TILES_N; ++n)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        sums.total[m][n][i] = __fadd_rn(sums.total[m][n][i], __fmul_rn(sums.within[p][m][n][i], x));
                        sums.within[p][m][n][i] = 0.f;
                    }
            }
}
#endif

// Adds the terms of a granule to the total and starts its sums over.
template <class OfRow, class OfColumn> SQ_INLINE void end_granule(Sums& sums, bool two, OfRow of_row, OfColumn of_column) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x[PATHS];
#pragma unroll
            for (int p = 0; p < PATHS; ++p) x[p] = of_row(p, m, half);
#pragma unroll
            for (int n = 0; n < TILES_N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float w = of_column(n, i);
#pragma unroll
                    for (int p = 0; p < PATHS; ++p) {
                        if (p && !two) continue;
                        // The exact sum, rounded to float, times the product of the two scales.
                        const float term = __fmul_rn(to_float(sums.codes[p][m][n][half * 2 + i]), __fmul_rn(x[p], w));
                        sums.total[m][n][half * 2 + i] = __fadd_rn(sums.total[m][n][half * 2 + i], term);
                        sums.codes[p][m][n][half * 2 + i] = START;
                    }
                }
        }
}

// A warp's fragments of 32 columns of K, of a stage's w: the two halves of K of tile n are word[n][0] and word[n][1].
struct WeightFragments { uint32 word[TILES_N][2]; };

template <int row_bytes> SQ_INLINE void load_bytes(WeightFragments& w, const uint8* tile, int row, int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TILES_N; n += 2) {
        uint32 words[4];
        load_fragments(words, tile + swizzled<row_bytes>(row + n * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
        w.word[n][0] = words[0], w.word[n][1] = words[1], w.word[n + 1][0] = words[2], w.word[n + 1][1] = words[3];
    }
}

// Two neighbors out of the low byte of a word, an int4 code in the low end of each half.
SQ_INLINE uint32 spread_nibbles(uint32 byte) { return (byte & 0xfu) | (byte << 12 & 0xf0000u); }

SQ_INLINE void load_codes_w(WeightFragments& w, const uint8* tile, int row, int k) {
#if FORMAT == 0 || FORMAT == 2
    load_bytes<BW>(w, tile, row, k);
#else
    // 16 bytes of four tiles at once. A lane gets four neighbors of int8, or eight of int4.
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TILES_N; n += 4) {
        uint32 words[4];
        load_fragments(words, tile + swizzled<BW>(row + n * 8 + lane, FORMAT == 4 ? 0 : k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32(&to)[2] = w.word[n + i];
            if (FORMAT == 1) unpack_int4x8_times16(words[i], to[0], to[1]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (FORMAT == 3) to[j] = codes8_to_float16x2<HALF>(pick_bytes(words[i], 0, j ? 0x3322 : 0x1100));
                if (FORMAT == 4) to[j] = codes4_to_float16x2<HALF>(spread_nibbles(words[i] >> (16 * k + 8 * j)));
            }
        }
    }
#endif
}

// A warp's 16 rows of x from `row` on, 32 columns, or 16 of 16 bits.
SQ_INLINE void load_codes_x(uint32 (&a)[4], const uint8* tile, int row, int k) {
    const int lane = threadIdx.x % 32;
#if FORMAT == 0 || FORMAT == 2
    load_fragments(a, tile + swizzled<BK>(row + lane % 16, k * 2 + lane / 16));
#else
    // The order of columns in a product is free as long as both sides agree: the same neighbors here, 8 bytes of them.
    struct alignas(8) Words2 { uint32 word[2]; };
    const int chunk = FORMAT == 4 ? lane % 4 : k * 2 + lane % 4 / 2, byte = FORMAT == 4 ? k * 8 : lane % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Words2 words = *(const Words2*)(tile + swizzled<BK>(row + half * 8 + lane / 4, chunk) + byte);
        a[half] = words.word[0], a[half + 2] = words.word[1];
    }
#endif
}

SQ_INLINE void multiply_codes(Sum (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#if FLOATS
    multiply_add_float16<HALF>(sum, a, b[0], b[1]);
#else
    multiply_add(sum, a, b[0], b[1]);
#endif
}

extern "C" __global__ void BOUNDS s8_gemm(
    const uint8* __restrict__ x,        // (M, K) codes, or 16-bit values
    const uint8* __restrict__ w,        // (N, K) codes; int4: (N, K / 2)
    void* __restrict__ y,               // (M, N)
    const float* __restrict__ scale_x,  // (segments * PATHS, M), or with tokens = 1 (…, 1); FLOATS: not read
    int tokens,
    const float* __restrict__ scale_w,  // (granules or 1, N)
    int scale_w_stride,                 // N, or 0: the same for all granules
    const float* __restrict__ bias,     // (N,), or null
    int M, int N, int K,                // K: a multiple of 64
    const int* __restrict__ ends,       // (granules,) one past the last column of each, multiples of 32
    const int* __restrict__ duals,      // (segments,) 1 where the sign matters; or null: everywhere
    const float* __restrict__ gate,     // (M / gate_rows, N), or null: 1
    int gate_rows,
    const void* __restrict__ residual,  // (M, N), as y
    const int* __restrict__ segments    // (granules,) the segment of each; or null: granules are segments
#if LOW_RANK
    , const uint16* __restrict__ t,     // (M, rank)
    const uint16* __restrict__ up,      // (N, rank)
    int rank                            // a multiple of 8
#endif
) {
    SQ_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / (BN / WN) * WM, warp_column = warp % (BN / WN) * WN;

    // Eight rows of tiles at a time, column by column: what neighbors in time read stays in the cache.
    const int tiles_m = (M + BM - 1) / BM, tiles_n = (N + BN - 1) / BN;
    const int band = blockIdx.x / (8 * tiles_n), first_tile = band * 8;
    const int band_rows = tiles_m - first_tile < 8 ? tiles_m - first_tile : 8;
    const int in_band = blockIdx.x - band * 8 * tiles_n;
    const int tile_row = (first_tile + in_band % band_rows) * BM, tile_column = in_band / band_rows * BN;

    const int steps = K / STEP;
    auto load_step = [&](int step) {
        uint8* to = shared + step % STAGES * STAGE_BYTES;
        if (step < steps) {
            load_tile<BM, BK, false>(to, x, tile_row, M, step * BK, K * (BK / STEP));
            load_tile<BN, BW, false>(to + BM * BK, w, tile_column, N, step * BW, K >> NIBBLES);
        }
        copies_commit();
    };

    Sums sums;
    clear(sums);
    const Place place = {tile_row + warp_row + lane / 4, tile_column + warp_column + lane % 4 * 2, M, N};
    const ScaleTables tables = {scale_x, scale_w, duals, segments, tokens, scale_w_stride};
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) load_step(s);
    Granule granule = granule_at(tables, 0);
    auto of_row = [&](int p, int m, int half) { return row_scale(granule, p, place.row + m * 16 + half * 8, M); };
#if SEGMENTED
    int index = 0, boundary = ends[0];
    // The columns' scales come to registers long before they are needed. Those of rows stay the same within a segment.
    float scales_w[TILES_N][2];
    auto load_scales = [&] {
#pragma unroll
        for (int n = 0; n < TILES_N * 2; ++n) scales_w[n / 2][n % 2] = column_scale(granule, place.column + n / 2 * 8 + n % 2, N);
    };
    load_scales();
    auto of_column = [&](int n, int i) { return scales_w[n][i]; };
#else
    auto of_column = [&](int n, int i) { return column_scale(granule, place.column + n * 8 + i, N); };
#endif

    for (int step = 0; step < steps; ++step) {
        // The tile of this step has landed for all threads, and all are done with the one before.
        copies_wait<STAGES - 2>();
        __syncthreads();
        load_step(step + STAGES - 1);
        const uint8* tile_x = shared + step % STAGES * STAGE_BYTES;
        const uint8* tile_w = tile_x + BM * BK;
#pragma unroll
        for (int k = 0; k < BK / 32; ++k) {
            WeightFragments b;
            load_codes_w(b, tile_w, warp_column, k);
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                uint32 a[4];
                load_codes_x(a, tile_x, warp_row + m * 16, k);
#if DUAL
                uint32 negative[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    negative[i] = granule.two ? a[i] & negative_bytes(a[i]) : 0;
                    a[i] ^= negative[i];
                }
#endif
#pragma unroll
                for (int n = 0; n < TILES_N; ++n) {
                    multiply_codes(sums.codes[0][m][n], a, b.word[n]);
#if DUAL
                    if (granule.two) multiply_codes(sums.codes[1][m][n], negative, b.word[n]);
#endif
                }
            }
#if SEGMENTED
            const int done = step * STEP + (k + 1) * (STEP / 2);
            if (done == boundary && done < K) {
#if GROUPED
                end_group(sums, granule.two, of_column);
                if (SEGMENTED == 3 && segments[index] != segments[index + 1]) end_segment(sums, granule.two, of_row);
#else
                end_granule(sums, granule.two, of_row, of_column);
#endif
                boundary = ends[++index];
                granule = granule_at(tables, index);
                load_scales();
            }
#endif
        }
    }
#if GROUPED
    end_group(sums, granule.two, of_column);
    end_segment(sums, granule.two, of_row);
#else
    end_granule(sums, granule.two, of_row, of_column);
#endif
#if FORMAT == 1
    // The weights came times 16. A power of two takes no part in any rounding, so that once, here, is enough.
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.total[m][n][i] = __fmul_rn(sums.total[m][n][i], 0.0625f);
#endif
    copies_wait<0>();

#if LOW_RANK
    // The buffers are free now: 32 columns of t and of up in one, the next 32 on their way to the other.
    auto load_branch = [&](int step) {
        uint8* to = shared + step % 2 * ((BM + BN) * BK);
        if (step * BK < rank * 2) {
            load_tile<BM, BK, true>(to, t, tile_row, M, step * BK, rank * 2);
            load_tile<BN, BK, true>(to + BM * BK, up, tile_column, N, step * BK, rank * 2);
        }
        copies_commit();
    };
    __syncthreads();
    load_branch(0);
#pragma unroll 1
    for (int step = 0; step * BK < rank * 2; ++step) {
        load_branch(step + 1);
        copies_wait<1>();
        __syncthreads();
        const uint8* tile_t = shared + step % 2 * ((BM + BN) * BK);
#pragma unroll
        for (int k = 0; k < BK / 32; ++k) {
            WeightFragments b;
            load_bytes<BK>(b, tile_t + BM * BK, warp_column, k);
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                uint32 a[4];
                load_fragments(a, tile_t + swizzled<BK>(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
                for (int n = 0; n < TILES_N; ++n)
                    multiply_add_float16<LOW_RANK == 2>(sums.total[m][n], a, b.word[n][0], b.word[n][1]);
            }
        }
        __syncthreads();
    }
    copies_wait<0>();
#endif

    // The bias, the residual, and out.
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                const int row = place.row + m * 16 + half * 8, column = place.column + n * 8;
                if (row >= M || column >= N) continue;
                const bool both = column + 1 < N;
                float value[2] = {sums.total[m][n][half * 2], sums.total[m][n][half * 2 + 1]};
                if (bias) {
                    value[0] = __fadd_rn(value[0], bias[column]);
                    if (both) value[1] = __fadd_rn(value[1], bias[column + 1]);
                }
#if RESIDUAL
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (i && !both) continue;
                    float by = gate ? gate[(int64)(row / gate_rows) * N + column + i] : 1.f;
                    value[i] = fmaf(by, value[i], load_value(residual, (int64)row * N + column + i));
                }
#endif
                store_pair(y, (int64)row * N + column, value[0], value[1], both);
            }
}
