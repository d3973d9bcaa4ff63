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

#define NORM (PRODUCER == 1 || PRODUCER == 2)
#define VECTORS (NORM ? WEIGHT + BIAS + SCALED + SHIFTED : 0)  // that a thread keeps parts of in shared memory
#define KEPT_BYTES (VECTORS * CHUNKS * THREADS * 16 * IN_BYTES)
#define GROUPS (CHUNKS * WARPS)  // of 512 columns, each with a sum of its own
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

#if NORM
// ---- vectors over the columns: a thread keeps the parts that belong to its columns, where only it reads them
SQ_INLINE Words4* part_of(Words4* kept, int vector, int chunk, int i) {
    return kept + ((vector * CHUNKS + chunk) * IN_BYTES + i) * THREADS + threadIdx.y * ACROSS + threadIdx.x;
}

SQ_INLINE void keep(Words4* kept, int vector, int chunk, const uint32 (&raw)[WORDS]) {
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i) *part_of(kept, vector, chunk, i) = Words4{{raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]}};
}

SQ_INLINE void recall(Words4* kept, int vector, int chunk, uint32 (&raw)[WORDS]) {
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i) {
        const Words4 v = *part_of(kept, vector, chunk, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) raw[4 * i + j] = v.word[j];
    }
}

#define SCALED_AT (WEIGHT + BIAS)
#define SHIFTED_AT (WEIGHT + BIAS + SCALED)

SQ_INLINE void keep_affine(Words4* kept, const Columns (&at)[CHUNKS], const uint8* weight, const uint8* bias) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        uint32 raw[WORDS];
        if (WEIGHT) {
            load16(raw, weight + (int64)at[c].source * IN_BYTES, at[c].count);
            keep(kept, 0, c, raw);
        }
        if (BIAS) {
            load16(raw, bias + (int64)at[c].source * IN_BYTES, at[c].count);
            keep(kept, WEIGHT, c, raw);
        }
    }
}

SQ_INLINE void keep_modulation(Words4* kept, const Columns (&at)[CHUNKS], const uint8* factors, const uint8* summands, int64 factors_bytes, int64 summands_bytes, int image) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        uint32 raw[WORDS];
        if (SCALED) {
            load16(raw, factors + image * factors_bytes + (int64)at[c].source * IN_BYTES, at[c].count);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) raw[i] = sum_of(raw[i], INPUT == 2 ? 0x3f800000u : INPUT == 1 ? 0x3c003c00u : 0x3f803f80u);
            keep(kept, SCALED_AT, c, raw);
        }
        if (SHIFTED) {
            load16(raw, summands + image * summands_bytes + (int64)at[c].source * IN_BYTES, at[c].count);
            keep(kept, SHIFTED_AT, c, raw);
        }
    }
}

// ---- sums in a fixed order: sixteen columns by halves, 512 columns by halves, then one group after the other
template <int N> SQ_INLINE void add_halves(float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], v[i + N]);
}

SQ_INLINE float sum_of_sixteen(float (&v)[16]) {
    add_halves<8>(v);
    add_halves<4>(v);
    add_halves<2>(v);
    return __fadd_rn(v[0], v[1]);
}

SQ_INLINE float sum_of_warp(float v) {
#pragma unroll
    for (int n = 16; n; n /= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, n));
    return v;
}

SQ_INLINE float sum_of_row(const float (&part)[CHUNKS], float* sums) {
    float total = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const float group = sum_of_warp(part[c]);
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

// What a norm makes of a row, in place.
SQ_INLINE void normalize(uint32 (&raw)[CHUNKS][WORDS], const Columns (&at)[CHUNKS], Words4* kept, float* sums, int columns, float eps) {
    float part[CHUNKS], v[16], mean = 0.f;
#if PRODUCER == 1
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        to_floats(v, raw[c]);
        part[c] = sum_of_sixteen(v);
    }
    mean = __fdiv_rn(sum_of_row(part, sums), (float)columns);
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        to_floats(v, raw[c]);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float off = PRODUCER == 1 ? __fsub_rn(v[i], mean) : v[i];
            v[i] = __fmul_rn(off, off);
        }
        if (PRODUCER == 1 && at[c].count < 16)
#pragma unroll
            for (int i = 0; i < 16; ++i) v[i] = i < at[c].count ? v[i] : 0.f;
        part[c] = sum_of_sixteen(v);
    }
    const float variance = __fdiv_rn(sum_of_row(part, sums + GROUPS), (float)columns);
    const float factor = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(variance, eps)));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        uint32 other[WORDS];
        to_floats(v, raw[c]);
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = __fmul_rn(PRODUCER == 1 ? __fsub_rn(v[i], mean) : v[i], factor);
        if (PRODUCER == 1) {  // weight and bias of a LayerNorm act on floats, those of an RMSNorm on what is rounded
            if (WEIGHT) {
                recall(kept, 0, c, other);
#pragma unroll
                for (int i = 0; i < 16; ++i) v[i] = __fmul_rn(v[i], to_float(other, i));
            }
            if (BIAS) {
                recall(kept, WEIGHT, c, other);
#pragma unroll
                for (int i = 0; i < 16; ++i) v[i] = __fadd_rn(v[i], to_float(other, i));
            }
        }
        from_floats(raw[c], v);
#pragma unroll
        for (int vector = PRODUCER == 1 ? WEIGHT + BIAS : 0; vector < VECTORS; ++vector) {
            recall(kept, vector, c, other);
            const bool adds = vector == WEIGHT + BIAS + SCALED || (BIAS && vector == WEIGHT);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) raw[c][i] = adds ? sum_of(raw[c][i], other[i]) : product_of(raw[c][i], other[i]);
        }
        if (at[c].count < 16) {  // columns that do not exist stay zero
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                const int here = INPUT == 2 ? i : 2 * i;
                if (here >= at[c].count) raw[c][i] = 0;
                else if (INPUT != 2 && here + 1 >= at[c].count) raw[c][i] &= 0xffffu;
            }
        }
    }
}
#endif

#if PRODUCER == 3
// x * sigmoid(x * p(x*x)) is SiLU for p = 1, and GELU by tanh for a p with two terms. For seven terms, fitted to the
// normal distribution, it is GELU itself to 2e-7. Here p has the factor log2(e).
SQ_INLINE float exponent_of(float x) {
#if ACTIVATION == 0
    const float p = 1.44269504f;
#elif ACTIVATION == 1
    const float p = fmaf(__fmul_rn(x, x), .10294324f, 2.3022082f);
#else
    const float u = fminf(__fmul_rn(x, x), 30.25f);
    float p = 4.98275199e-9f;
    p = fmaf(p, u, -3.75782150e-7f);
    p = fmaf(p, u, 1.13155556e-5f);
    p = fmaf(p, u, -1.58473165e-4f);
    p = fmaf(p, u, -9.84266444e-5f);
    p = fmaf(p, u, .104842223f);
    p = fmaf(p, u, 2.302205801f);
#endif
    return fminf(__fmul_rn(-x, p), 63.f);  // the product of two powers stays finite
}

SQ_INLINE void activate(uint32 (&raw)[WORDS]) {
    float v[16];
    to_floats(v, raw);
#pragma unroll
    for (int i = 0; i < 16; i += 2) {  // a reciprocal costs as much as eight products: two share one
        const float a = __fadd_rn(1.f, approximate_exp2(exponent_of(v[i]))), b = __fadd_rn(1.f, approximate_exp2(exponent_of(v[i + 1])));
        const float both = approximate_reciprocal(__fmul_rn(a, b));
        v[i] = __fmul_rn(v[i], __fmul_rn(both, b));
        v[i + 1] = __fmul_rn(v[i + 1], __fmul_rn(both, a));
    }
    from_floats(raw, v);
}
#endif
