// y = sum over terms of (scale_x · scale_w) · (codes_x · codes_w) + bias, on int8 tensor cores of sm_80 and
// later. A term is an input segment or, with DUAL, one polarity of a segment.
//
// A block makes a BM x BN tile of y. Tiles of 64 bytes of K come in STAGES buffers ahead of the
// product; a warp multiplies its part, 16x8x32 at a time. Where K crosses a segment boundary the int32
// sums are scaled into float ones and start over. Nothing but y is written.
//
// Fixed when compiled:
//   OUTPUT      0 bfloat16, 1 float16, 2 float32
//   DUAL        the sign of a code of x selects its scale
//   SEGMENTED   more than one segment
//   RESIDUAL    y = residual + gate · (the above)
//   BM BN       rows and columns of a tile; WM WN: of a warp's part
//   STAGES      buffers
#include "common/memory.cuh"
#include "common/numbers.cuh"
#include "mma/int8.cuh"

#define BK 64
#define THREADS (BM / WM * (BN / WN) * 32)
#define TILES_M (WM / 16)
#define TILES_N (WN / 8)
#define PATHS (DUAL ? 2 : 1)
#define STAGE_BYTES ((BM + BN) * BK)
// Two blocks on a multiprocessor are worth having, but not where they cost spills.
#if SEGMENTED
#define BOUNDS __launch_bounds__(THREADS, 1)
#else
#define BOUNDS __launch_bounds__(THREADS)
#endif

// Where 16 bytes of a row lie: two rows fill all 32 banks, so that the chunks of a row trade places
// with those of every second row, and eight rows read at one chunk touch every bank once.
SQ_INLINE int swizzled(int row, int chunk) { return row * BK + ((chunk ^ row >> 1 & 3) << 4); }

// One tile of rows, from global to shared memory; rows that do not exist become zero.
template <int rows> SQ_INLINE void load_tile(uint8* to, const int8* from, int first, int last, int k, int K) {
#pragma unroll
    for (int i = threadIdx.x; i < rows * (BK / 16); i += THREADS) {
        int row = i / (BK / 16), chunk = i % (BK / 16);
        bool exists = first + row < last;
        copy16_async(to + swizzled(row, chunk), from + (int64)(exists ? first + row : 0) * K + k + chunk * 16, exists ? 16 : 0);
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

SQ_INLINE float load_value(const void* y, int64 at) {
#if OUTPUT == 2
    return ((const float*)y)[at];
#else
    uint16 bits = ((const uint16*)y)[at];
    return OUTPUT == 1 ? half_to_float(bits) : bfloat16_to_float(bits);
#endif
}

// The part of y that a warp makes.
struct Sums {
    int integer[PATHS][TILES_M][TILES_N][4];
#if SEGMENTED
    float scaled[TILES_M][TILES_N][4];
#define SUM_SO_FAR(sums, m, n, i) sums.scaled[m][n][i]
#else
#define SUM_SO_FAR(sums, m, n, i) 0.f
#endif
};

// The rows and columns of a thread's values in y: value i of tile (m, n) is in row 16m + 8(i / 2) and
// column 8n + i % 2 from here.
struct Place { int row, column, M, N; };

// Adds the terms of one segment and starts the integer sums over. `visit` gets what has come together
// so far, two neighboring columns of a row at a time.
template <class Visit> SQ_INLINE void end_segment(
    Sums& sums, const Place& place, bool two, const float* scale_x, int64 token_stride, int64 term_stride, const float* scale_w, Visit visit) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = place.row + m * 16 + half * 8;
            float x[PATHS];
#pragma unroll
            for (int p = 0; p < PATHS; ++p) x[p] = row < place.M && (two || !p) ? scale_x[p * term_stride + row * token_stride] : 0.f;
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                float value[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int column = place.column + n * 8 + i, at = half * 2 + i;
                    const float w = column < place.N ? scale_w[column] : 0.f;
                    value[i] = SUM_SO_FAR(sums, m, n, at);
#pragma unroll
                    for (int p = 0; p < PATHS; ++p) {
                        if (p && !two) continue;
                        // The exact integer, rounded to float, times the product of the two scales.
                        float term = __fmul_rn(__int2float_rn(sums.integer[p][m][n][at]), __fmul_rn(x[p], w));
                        value[i] = __fadd_rn(value[i], term);
                        sums.integer[p][m][n][at] = 0;
                    }
                }
                visit(m, n, half, value);
            }
        }
}

extern "C" __global__ void BOUNDS s8_gemm(
    const int8* __restrict__ x,         // (M, K) codes
    const int8* __restrict__ w,         // (N, K) codes
    void* __restrict__ y,               // (M, N)
    const float* __restrict__ scale_x,  // (segments * PATHS, M), or with tokens = 1 (…, 1)
    int tokens,
    const float* __restrict__ scale_w,  // (segments or 1, N)
    int scale_w_stride,                 // N, or 0: the same for all segments
    const float* __restrict__ bias,     // (N,), or null
    int M, int N, int K,                // K: a multiple of 64
    const int* __restrict__ ends,       // (segments,) one past the last column of each, multiples of 32
    const int* __restrict__ duals,      // (segments,) 1 where the sign matters; or null: everywhere
    const float* __restrict__ gate,     // (M / gate_rows, N), or null: 1
    int gate_rows,
    const void* __restrict__ residual) {  // (M, N), as y
    SQ_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / (BN / WN) * WM, warp_column = warp % (BN / WN) * WN;

    // Eight rows of tiles at a time, column by column: what neighbors in time read stays in the cache.
    const int tiles_m = (M + BM - 1) / BM, tiles_n = (N + BN - 1) / BN;
    const int band = blockIdx.x / (8 * tiles_n), first_tile = band * 8;
    const int band_rows = tiles_m - first_tile < 8 ? tiles_m - first_tile : 8;
    const int in_band = blockIdx.x - band * 8 * tiles_n;
    const int tile_row = (first_tile + in_band % band_rows) * BM, tile_column = in_band / band_rows * BN;

    Sums sums = {};
    const Place place = {tile_row + warp_row + lane / 4, tile_column + warp_column + lane % 4 * 2, M, N};
    const int64 token_stride = tokens > 1, term_stride = tokens;
    bool two = DUAL && (!duals || duals[0]);
#if SEGMENTED
    int segment = 0, boundary = ends[0];
#endif

    const int steps = K / BK;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) {
            load_tile<BM>(shared + s * STAGE_BYTES, x, tile_row, M, s * BK, K);
            load_tile<BN>(shared + s * STAGE_BYTES + BM * BK, w, tile_column, N, s * BK, K);
        }
        copies_commit();
    }

    for (int step = 0; step < steps; ++step) {
        // The tile of this step has landed for all threads, and all are done with the one before.
        copies_wait<STAGES - 2>();
        __syncthreads();
        const int ahead = step + STAGES - 1;
        if (ahead < steps) {
            uint8* to = shared + ahead % STAGES * STAGE_BYTES;
            load_tile<BM>(to, x, tile_row, M, ahead * BK, K);
            load_tile<BN>(to + BM * BK, w, tile_column, N, ahead * BK, K);
        }
        copies_commit();

        const uint8* tile_x = shared + step % STAGES * STAGE_BYTES;
        const uint8* tile_w = tile_x + BM * BK;
#pragma unroll
        for (int k = 0; k < BK / 32; ++k) {
            uint32 b[TILES_N / 2][4];
#pragma unroll
            for (int n = 0; n < TILES_N / 2; ++n)  // both halves of K for two tiles of 8 columns
                load_fragments(b[n], tile_w + swizzled(warp_column + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                uint32 a[4];
                load_fragments(a, tile_x + swizzled(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
#if DUAL
                uint32 negative[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    negative[i] = two ? a[i] & negative_bytes(a[i]) : 0;
                    a[i] ^= negative[i];
                }
#endif
#pragma unroll
                for (int n = 0; n < TILES_N; ++n) {
                    multiply_add(sums.integer[0][m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
#if DUAL
                    if (two) multiply_add(sums.integer[1][m][n], negative, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
#endif
                }
            }
#if SEGMENTED
            const int done = step * BK + (k + 1) * 32;
            if (done == boundary && done < K) {
                end_segment(sums, place, two, scale_x + segment * PATHS * term_stride, token_stride, term_stride,
                            scale_w + (int64)segment * scale_w_stride, [&](int m, int n, int half, const float* value) {
                                sums.scaled[m][n][half * 2] = value[0];
                                sums.scaled[m][n][half * 2 + 1] = value[1];
                            });
                boundary = ends[++segment];
                two = DUAL && (!duals || duals[segment]);
            }
#endif
        }
    }
    copies_wait<0>();

    // The last segment, the bias, and out.
#if !SEGMENTED
    const int segment = 0;
#endif
    end_segment(sums, place, two, scale_x + segment * PATHS * term_stride, token_stride, term_stride,
                scale_w + (int64)segment * scale_w_stride, [&](int m, int n, int half, float* value) {
        const int row = place.row + m * 16 + half * 8, column = place.column + n * 8;
        if (row >= M || column >= N) return;
        const bool both = column + 1 < N;
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
    });
}
