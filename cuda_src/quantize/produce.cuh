// What a layer reads, made in registers from what the layer before left: a norm with its modulation, or an
// activation. It is rounded to the model's own type wherever the model would have written it to memory.
//
// Fixed when compiled:
//   PRODUCER   0 nothing, 1 LayerNorm, 2 RMSNorm, 3 an activation
//   WEIGHT     the norm has a weight for each column
//   BIAS       and a bias
//   SCALED     each image has factors, of which 1 is left out
//   SHIFTED    and summands
//   ACTIVATION 0 SiLU, 1 GELU by tanh, 2 GELU by erf
//   GATED      the activation of one half of a row is multiplied with the other half
//   KEEP       1: what a norm makes is written as well; 2: and nothing else
#pragma once
#include "quantize/columns.cuh"
#ifndef KEEP
#define KEEP 0
#endif

#if PRODUCER == 3
#define GATES GATED
#else
#define GATES 0
#endif
#define TENSORS (GATES ? 2 : 1)  // that a row is read from
#define NORM (PRODUCER == 1 || PRODUCER == 2)
#define ROUNDS (ACROSS < 32 ? 32 / ACROSS : 1)  // vectors of a thread in 512 columns
#define GROUPS ((CHUNKS + ROUNDS - 1) / ROUNDS * WARPS)  // of 512 columns, each with a sum of its own
#define SUMS (NORM ? 4 * GROUPS : 0)  // floats for each row of a block: two sums, for rows that take turns

// ---- numbers of the model's type, two to a word, or floats
SQ_INLINE uint32 rounded_pair(float low, float high) { return INPUT == 1 ? floats_to_halfx2(low, high) : floats_to_bfloat16x2(low, high); }

// Sixteen floats, rounded to the type that they would have in memory.
SQ_INLINE void from_floats(uint32 (&raw)[WORDS], const float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = INPUT == 2 ? __float_as_uint(v[i]) : rounded_pair(v[2 * i % 16], v[(2 * i + 1) % 16]);
}

SQ_INLINE void to_floats(float (&v)[16], const uint32 (&raw)[WORDS]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = to_float(raw, i);
}

SQ_INLINE uint32 product_of(uint32 a, uint32 b) {  // a fused product and sum rounds once; adding -0 changes nothing
#if INPUT == 2
    return __float_as_uint(__fmul_rn(__uint_as_float(a), __uint_as_float(b)));
#else
    return INPUT == 1 ? halfx2_fma(a, b, 0x80008000u) : bfloat16x2_fma(a, b, 0x80008000u);
#endif
}

SQ_INLINE uint32 sum_of(uint32 a, uint32 b) {
#if INPUT == 2
    return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b)));
#else
    return INPUT == 1 ? halfx2_fma(a, 0x3c003c00u, b) : bfloat16x2_fma(a, 0x3f803f80u, b);
#endif
}

SQ_INLINE void multiply(uint32 (&raw)[WORDS], const uint32 (&other)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = product_of(raw[i], other[i]);
}

SQ_INLINE void add(uint32 (&raw)[WORDS], const uint32 (&other)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = sum_of(raw[i], other[i]);
}

#if NORM
// ---- vectors over the columns, which stay in the cache that a multiprocessor has
struct Vectors { const uint8 *weight, *bias, *factors, *summands; };

SQ_INLINE void part_of(uint32 (&raw)[WORDS], const uint8* vector, const Columns& at) { load16(raw, vector + (int64)at.source * IN_BYTES, at.count); }

// ---- sums in a fixed order: sixteen columns by halves, 512 columns by halves, then one group after the other
template <int N> SQ_INLINE void add_halves(float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], v[i + N]);
}

SQ_INLINE float sum_of_sixteen(const float (&values)[16]) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fadd_rn(values[i], values[i + 8]);
    add_halves<4>(v);
    add_halves<2>(v);
    return __fadd_rn(v[0], v[1]);
}

SQ_INLINE float sum_of_warp(float v) {
#pragma unroll
    for (int n = ACROSS < 32 ? ACROSS / 2 : 16; n; n /= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, n));
    return v;
}

SQ_INLINE float sum_of_row(const float (&part)[CHUNKS], float* sums) {
    float total = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c += ROUNDS) {
        float halves[ROUNDS];
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) halves[i] = c + i < CHUNKS ? part[c + i < CHUNKS ? c + i : 0] : 0.f;
#pragma unroll
        for (int n = ROUNDS / 2; n; n /= 2)
#pragma unroll
            for (int i = 0; i < n; ++i) halves[i] = __fadd_rn(halves[i], halves[i + n]);
        const float group = sum_of_warp(halves[0]);
        if (WARPS == 1) total = c ? __fadd_rn(total, group) : group;
        else if (threadIdx.x % 32 == 0) sums[c * WARPS + threadIdx.x / 32] = group;
    }
    if (WARPS > 1) {
        __syncthreads();
        total = sums[0];
#pragma unroll
        for (int g = 1; g < GROUPS; ++g) total = __fadd_rn(total, sums[g]);
    }
    return total;
}

// Sixteen values to memory, of which the first `count` exist.
SQ_INLINE void store16(uint8* to, const uint32 (&raw)[WORDS], int count) {
    const bool whole = ALIGNED && (WHOLE || count >= 16);
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i)
        if (whole && count > 0) *(Words4*)(to + 16 * i) = Words4{{raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]}};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (whole || i >= count) continue;
#if INPUT == 2
        ((uint32*)to)[i] = raw[i];
#else
        ((uint16*)to)[i] = (uint16)(raw[i / 2] >> (i % 2 * 16));
#endif
    }
}

// What a norm makes of a row.
SQ_INLINE void normalize(
    uint32 (&raw)[CHUNKS][WORDS], uint8* stage, const uint8* from, const Columns (&at)[CHUNKS], const Vectors& vectors, float* sums, int columns, float eps) {
    float part[CHUNKS], value[CHUNKS][16];
    uint32 words[WORDS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        take(words, stage, c, at, from);
        to_floats(value[c], words);
    }
#if PRODUCER == 1
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) part[c] = sum_of_sixteen(value[c]);
    const float mean = __fdiv_rn(sum_of_row(part, sums), (float)columns);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 16; ++i)  // columns that do not exist deviate by nothing
            value[c][i] = WHOLE == 2 || (WHOLE ? 0 : i) < at[c].count ? __fsub_rn(value[c][i], mean) : 0.f;
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        float square[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) square[i] = __fmul_rn(value[c][i], value[c][i]);
        part[c] = sum_of_sixteen(square);
    }
    const float variance = __fdiv_rn(sum_of_row(part, sums + GROUPS), (float)columns);
    const float factor = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(variance, eps)));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        float (&v)[16] = value[c];
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = __fmul_rn(v[i], factor);
        if (PRODUCER == 1) {  // weight and bias of a LayerNorm act on floats, those of an RMSNorm on what is rounded
            if (WEIGHT) {
                part_of(words, vectors.weight, at[c]);
#pragma unroll
                for (int i = 0; i < 16; ++i) v[i] = __fmul_rn(v[i], to_float(words, i));
            }
            if (BIAS) {
                part_of(words, vectors.bias, at[c]);
#pragma unroll
                for (int i = 0; i < 16; ++i) v[i] = __fadd_rn(v[i], to_float(words, i));
            }
        }
        from_floats(raw[c], v);
        if (PRODUCER == 2 && WEIGHT) {
            part_of(words, vectors.weight, at[c]);
            multiply(raw[c], words);
        }
        if (PRODUCER == 2 && BIAS) {
            part_of(words, vectors.bias, at[c]);
            add(raw[c], words);
        }
        if (SCALED) {
            part_of(words, vectors.factors, at[c]);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) words[i] = sum_of(words[i], INPUT == 2 ? 0x3f800000u : INPUT == 1 ? 0x3c003c00u : 0x3f803f80u);
            multiply(raw[c], words);
        }
        if (SHIFTED) {
            part_of(words, vectors.summands, at[c]);
            add(raw[c], words);
        }
        if (WHOLE == 2) continue;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {  // columns that do not exist stay zero
            const int here = WHOLE ? 0 : INPUT == 2 ? i : 2 * i;
            if (here >= at[c].count) raw[c][i] = 0;
            else if (!WHOLE && INPUT != 2 && here + 1 >= at[c].count) raw[c][i] &= 0xffffu;
        }
    }
}
#endif

#if PRODUCER == 3
// x * sigmoid(x * p(x*x)) is SiLU for p = 1, and GELU by tanh for a p with two terms. For seven terms, fitted to the
// normal distribution, it is GELU itself to 2e-7; the last term is positive, so that nothing goes astray beyond the fit.
// Here p has the factor -log2(e).
SQ_INLINE float exponent_of(float x) {
#if ACTIVATION == 0
    return __fmul_rn(x, -1.44269504f);
#elif ACTIVATION == 1
    return __fmul_rn(x, fmaf(__fmul_rn(x, x), -.10294324f, -2.3022082f));
#else
    const float u = __fmul_rn(x, x);
    float p = -4.98275199e-9f;
    p = fmaf(p, u, 3.75782150e-7f);
    p = fmaf(p, u, -1.13155556e-5f);
    p = fmaf(p, u, 1.58473165e-4f);
    p = fmaf(p, u, 9.84266444e-5f);
    p = fmaf(p, u, -.104842223f);
    p = fmaf(p, u, -2.302205801f);
    return __fmul_rn(x, p);
#endif
}

SQ_INLINE void activate(uint32 (&raw)[WORDS]) {
    float v[16];
    to_floats(v, raw);
#pragma unroll
    for (int i = 0; i < 16; ++i)  // where the power is infinite its reciprocal is zero
        v[i] = __fmul_rn(v[i], approximate_reciprocal(__fadd_rn(1.f, approximate_exp2(exponent_of(v[i])))));
    from_floats(raw, v);
}
#endif
