// 1 to 16 rows of x become codes, and scales behind them, in the order in which sm80_s8_gemv.cu wants to read them (or floats in that of sm80_f16_gemv.cu): a block
// for each row, every value read once and kept in registers. The kernel that multiplies may start meanwhile.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16, 2 float32, 3 codes: only put in order, and their scales behind them
//   W_BITS     of the weight that will be multiplied: 8, or 4
//   X_BITS     8, or 4: what x is quantized to; 16: it stays as it is
//   DUAL       the sign of a code selects its scale
//   DYNAMIC    the scales of x are found here; otherwise they are read
//   SMOOTH     columns are multiplied with a vector first
//   SILU       x is an input of a SiLU
//   SEGMENTED  x has more than one segment
//   ALIGNED    rows and segments of x start at multiples of 16 bytes, and have a multiple of 8 columns
//   HELD       vectors of eight values of a thread
//   OVERLAP    may the next kernel start before this one ends?
#include "common/overlap.cuh"
#include "gemv/activations.cuh"
#include "gemv/dual.cuh"
#include "gemv/layout.cuh"

#define THREADS 512

struct Words2 { uint32 word[2]; };

#if X_BITS == 4
#define HIGHEST 7.f
#define LOWEST -8.f
#else
#define HIGHEST 127.f
#define LOWEST -128.f
#endif

// int4 codes of W are multiplied as they come out of their bytes, first those of even columns, then those of odd ones.
SQ_INLINE Words2 in_order(uint32 columns0to3, uint32 columns4to7) {
#if W_BITS == 4
    return {{pick_bytes(columns0to3, columns4to7, 0x6420), pick_bytes(columns0to3, columns4to7, 0x7531)}};
#else
    return {{columns0to3, columns4to7}};
#endif
}

#if X_BITS == 16
// Pairs of columns come out of the bytes of W apart; those of x follow.
SQ_INLINE Words4 values_in_order(const Raw& raw) {
    Words4 v;
#if W_BITS == 4  // 0 4, 1 5, 2 6, 3 7
    v.word[0] = pick_bytes(raw.word[0], raw.word[2], 0x5410);
    v.word[1] = pick_bytes(raw.word[0], raw.word[2], 0x7632);
    v.word[2] = pick_bytes(raw.word[1], raw.word[3], 0x5410);
    v.word[3] = pick_bytes(raw.word[1], raw.word[3], 0x7632);
#else  // 0 2, 1 3, 4 6, 5 7
    v.word[0] = pick_bytes(raw.word[0], raw.word[1], 0x5410);
    v.word[1] = pick_bytes(raw.word[0], raw.word[1], 0x7632);
    v.word[2] = pick_bytes(raw.word[2], raw.word[3], 0x5410);
    v.word[3] = pick_bytes(raw.word[2], raw.word[3], 0x7632);
#endif
    return v;
}

#elif INPUT < 3
SQ_INLINE void to_values(float (&value)[8], const Raw& raw, const float* smooth, int place) {
#if SMOOTH
    const Words4 factor[2] = {load_constant(smooth + place), load_constant(smooth + place + 4)};
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value[i] = raw_value(raw, i);
#if SMOOTH
        value[i] = __fmul_rn(value[i], __uint_as_float(factor[i / 4].word[i % 4]));
#endif
    }
}

// The first value of eight from which i have been shifted out.
SQ_INLINE float smoothed(const Raw& raw, const float* factors, int i) {
#if SMOOTH
    return __fmul_rn(raw_value(raw, 0), factors[i]);
#else
    return raw_value(raw, 0);
#endif
}

// The magnitude of the largest and of the smallest of eight values, zero between them; NaN and infinity do not count.
SQ_INLINE void magnitudes_of(uint32 (&found)[2], const Raw& raw, const float (&value)[8], const float* smooth) {
    float low = 0.f, high = 0.f;
#if INPUT == 2 || SMOOTH
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        low = fminf(low, value[i]);
        high = fmaxf(high, value[i]);
    }
#else  // two at a time
    Raw least = {}, most = {};
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        least.word[0] = INPUT ? halfx2_min(least.word[0], raw.word[i]) : bfloat16x2_min(least.word[0], raw.word[i]);
        most.word[0] = INPUT ? halfx2_max(most.word[0], raw.word[i]) : bfloat16x2_max(most.word[0], raw.word[i]);
    }
    low = fminf(raw_value(least, 0), raw_value(least, 1));
    high = fmaxf(raw_value(most, 0), raw_value(most, 1));
#endif
    found[0] = __float_as_uint(high) & 0x7fffffffu;
    found[1] = __float_as_uint(low) & 0x7fffffffu;
    if (found[0] < 0x7f800000u && found[1] < 0x7f800000u) return;
    found[0] = found[1] = 0;
    Raw rest = raw;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const float x = smoothed(rest, smooth, i);
        const uint32 magnitude = finite_magnitude(x);
        if (x < 0.f) found[1] = magnitude > found[1] ? magnitude : found[1];
        else found[0] = magnitude > found[0] ? magnitude : found[0];
        rest = shifted(rest);
    }
}

SQ_INLINE float code_range(bool below) { return below ? -LOWEST : HIGHEST; }

// A scale and its reciprocal, to divide by; no number where the reciprocal is not exact enough.
struct Divisor { float scale, reciprocal; };

SQ_INLINE Divisor divisor_of(float scale) {
    const bool usual = scale > 0x1p-60f && scale < 0x1p60f;
    return {scale, usual ? __frcp_rn(scale) : __uint_as_float(0x7fc00000u)};
}

// x / scale, rounded as a division: what the product with the reciprocal leaves is exact, and corrects it. Twice, as
// the first correction may still be off by one unit in the last place.
SQ_INLINE float divided(float x, const Divisor& by) {
    float q = __fmul_rn(x, by.reciprocal);
    q = fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);
    return fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);
}

// Eight codes.
SQ_INLINE Words2 quantized(const Raw& raw, const float* smooth, int place, const Divisor (&by)[PATHS]) {
    float value[8];
    to_values(value, raw, smooth, place);
    uint32 code[8];
    bool usual = true;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float quotient = divided(value[j], DUAL && value[j] < 0.f ? by[PATHS - 1] : by[0]);
        // A finite x has no way out of the range that its scale comes from; infinity and NaN are for the loop below.
        usual &= fabsf(quotient) < 0x1p30f;
        if (!DYNAMIC) quotient = fminf(fmaxf(quotient, LOWEST), HIGHEST);
        code[j] = __float_as_uint(__fadd_rn(quotient, SQ_ROUNDER));
    }
    uint32 word[2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
        word[j] = pick_bytes(pick_bytes(code[4 * j], code[4 * j + 1], 0x0040), pick_bytes(code[4 * j + 2], code[4 * j + 3], 0x0040), 0x5410);
    if (!usual) {  // rare, and short rather than fast
        Raw rest = raw;
#pragma unroll 1
        for (int j = 0; j < 8; ++j) {
            const float x = smoothed(rest, smooth + place, j);
            word[0] = word[0] >> 8 | word[1] << 24;
            word[1] = word[1] >> 8 | code_by_division(x, DUAL && x < 0.f ? by[PATHS - 1].scale : by[0].scale, LOWEST, HIGHEST) << 24;
            rest = shifted(rest);
        }
    }
    return in_order(word[0], word[1]);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) rows_codes(
    const uint8* __restrict__ x,        // (M, columns), row_bytes apart; codes: (M, width) int8
    int64 row_bytes,
    int columns,                        // of x
    const int* __restrict__ packed,     // (segments,) first packed column of each segment
    const int* __restrict__ source,     // (segments + 1,) its first column in x; last: columns of x
    int segments,
    const float* __restrict__ smooth,   // (width,) to multiply with
    const int* __restrict__ duals,      // (segments,) 1 where the sign matters; or null: everywhere
    const float* __restrict__ scale_x,  // (segments * PATHS, scale_tokens), if it is given
    int scale_tokens,                   // M, or 1: the same for all tokens
    int M, int width,                   // width: a multiple of 64
    int group,                          // tokens that are multiplied together
    uint8* __restrict__ made,           // for each group codes, then (terms, tokens) scales
    int made_bytes) {                   // of a group
#if DYNAMIC && X_BITS < 16
    SQ_SHARED(shared);
#endif
    let_next_kernel_start();
    const int which = blockIdx.x / group, first_token = which * group, token = blockIdx.x - first_token;
    const int tokens = M - first_token < group ? M - first_token : group;
    // Floats are zero beyond the last column, as a NaN times zero is none.
    const int vectors = X_BITS == 16 ? codes_bytes(width, 1) / VECTOR : width / VECTOR;
    const Input in = {x, row_bytes, packed, source, segments, columns, width};
    uint8* const codes = made + which * made_bytes;
    Raw held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS;
        held[i] = load_vector(in, blockIdx.x, v);
    }
#if INPUT < 3
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = activated(held[i]);
#endif
#if X_BITS == 16
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS;
        if (v < vectors) *(Words4*)(codes + value_place(v, token, tokens)) = values_in_order(held[i]);
    }
#else
    const int terms = segments * PATHS;
#if INPUT < 3
#if DYNAMIC
    uint32* const most = (uint32*)shared;  // (terms,)
#pragma unroll 1
    for (int i = threadIdx.x; i < terms; i += THREADS) most[i] = 0;
    __syncthreads();
    uint32 largest[PATHS] = {};
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS, place = v < vectors ? v * 8 : 0;
        const int segment = SEGMENTED ? columns_at(in, place).segment : 0;
        float value[8];
        uint32 found[2];
        to_values(value, held[i], smooth, place);
        magnitudes_of(found, held[i], value, smooth + place);
        if (!two_steps(duals, segment)) {
            found[0] = found[1] > found[0] ? found[1] : found[0];
            found[1] = 0;
        }
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
            // A maximum does not depend on the order: atomics keep it deterministic.
            if (SEGMENTED && v < vectors) atomicMax(most + segment * PATHS + p, found[p]);
            largest[p] = found[p] > largest[p] ? found[p] : largest[p];
        }
    }
#if !SEGMENTED
#pragma unroll
    for (int p = 0; p < PATHS; ++p) {
        const uint32 of_warp = warp_max(largest[p]);
        if (threadIdx.x % 32 == 0) atomicMax(most + p, of_warp);
    }
#endif
    __syncthreads();
#endif
#endif
    float* const steps = (float*)(codes + codes_bytes(width, tokens));  // (terms, tokens)
    auto step_of = [&](int term) {
#if DYNAMIC && INPUT < 3
        const int p = term % PATHS;
        const bool two = two_steps(duals, term / PATHS);
        return usable_scale(__fdiv_rn(__uint_as_float(most[two ? term : term - p]), two && p ? -LOWEST : HIGHEST));
#else
        return scale_x[(int64)term * scale_tokens + (scale_tokens > 1 ? blockIdx.x : 0)];
#endif
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < terms; i += THREADS) steps[i * tokens + token] = step_of(i);
#if INPUT < 3
    Divisor by[PATHS];
    if (!SEGMENTED) {
        const bool two = two_steps(duals, 0);
#pragma unroll
        for (int p = 0; p < PATHS; ++p) by[p] = divisor_of(step_of(two ? p : 0));
    }
#endif
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int v = threadIdx.x + i * THREADS;
        if (v >= vectors) continue;
#if INPUT == 3
#pragma unroll
        for (int j = 0; j < 2; ++j)
            *(Words2*)(codes + code_place(v * 2 + j, token, tokens)) = in_order(held[i].word[2 * j], held[i].word[2 * j + 1]);
#else
        if (SEGMENTED) {
            const int segment = columns_at(in, v * 8).segment;
            const bool two = two_steps(duals, segment);
#pragma unroll
            for (int p = 0; p < PATHS; ++p) by[p] = divisor_of(step_of(segment * PATHS + (two ? p : 0)));
        }
        *(Words2*)(codes + code_place(v, token, tokens)) = quantized(held[i], smooth, v * 8, by);
#endif
    }
#endif
}
