// Activations, eight columns at a time, wherever they start; SiLU on the way, if wanted.
#pragma once
#include "common/int4.cuh"
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define IN_BYTES (INPUT == 3 ? 1 : INPUT == 2 ? 4 : 2)
#define VECTOR (INPUT == 3 ? 16 : 8)          // columns that are handled together: 8 values, or 16 codes
#define WORDS (VECTOR * IN_BYTES / 4)

struct Raw { uint32 word[WORDS]; };

#if INPUT < 3
SQ_INLINE float raw_value(const Raw& raw, int i) {
#if INPUT == 2
    return __uint_as_float(raw.word[i]);
#elif INPUT == 1
    return half_to_float((uint16)(raw.word[i / 2] >> (i % 2 * 16)));
#else
    return __uint_as_float(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16);
#endif
}

// The values one place further down.
SQ_INLINE Raw shifted(const Raw& raw) {
    Raw result;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const uint32 next = i + 1 < WORDS ? raw.word[i + 1] : 0;
        result.word[i] = INPUT == 2 ? next : raw.word[i] >> 16 | next << 16;
    }
    return result;
}

// e^x, less than one unit in the last place off; the same bits wherever it runs, as it is made of exactly
// rounded steps. x = n log 2 + r with |r| <= log 2 / 2, then a polynomial, then 2^n in two factors.
SQ_INLINE float exponential(float x) {
    x = max_or_nan(min_or_nan(x, 89.f), -104.f);
    const float rounded = fmaf(x, 1.44269502f, SQ_ROUNDER), n = __fsub_rn(rounded, SQ_ROUNDER);
    const float r = fmaf(n, 1.90465432e-9f, fmaf(n, -0.693147182f, x));
    float p = 1.98412698e-4f;
    p = fmaf(p, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333377e-3f);
    p = fmaf(p, r, 4.16666679e-2f);
    p = fmaf(p, r, 1.66666672e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(__fmul_rn(r, r), p, r);
    const int whole = (int)(__float_as_uint(rounded) - __float_as_uint(SQ_ROUNDER)), half = whole / 2;
    const float first = __uint_as_float((uint32)(half + 127) << 23), second = __uint_as_float((uint32)(whole - half + 127) << 23);
    return __fmul_rn(__fmul_rn(__fadd_rn(p, 1.f), first), second);
}

// x / (1 + e^-x) in float32.
SQ_INLINE float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.f, exponential(-x))); }

// SiLU as a layer of its own computes it: rounded to the type of x. A loop, because a few hundred instructions more would have
// to be fetched while the weight is on its way; zeros, such as vectors beyond the last one, stay what they are.
SQ_INLINE Raw activated(const Raw& raw) {
#if SILU
    Raw r = raw;
    uint32 any = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) any |= r.word[i];
    if (!any) return r;
#pragma unroll 1
    for (int i = 0; i < WORDS; ++i) {
        const float first = silu(raw_value(r, 0));
#if INPUT == 2
        const uint32 done = __float_as_uint(first);
#else
        const float second = silu(raw_value(r, 1));
        const uint32 done = INPUT == 1 ? floats_to_halfx2(first, second) : floats_to_bfloat16x2(first, second);
#endif
#pragma unroll
        for (int j = 0; j + 1 < WORDS; ++j) r.word[j] = r.word[j + 1];
        r.word[WORDS - 1] = done;
    }
    return r;
#else
    return raw;
#endif
}

#endif

// Where the columns of x lie: each segment packed to a multiple of 32 columns, the row to one of 64.
struct Input {
    const uint8* x;          // (M, columns), row_bytes apart
    int64 row_bytes;
    const int* packed;       // (segments,) first packed column of each
    const int* source;       // (segments + 1,) its first column in x; last: columns of x
    int segments;
    int columns, width;      // of x, and packed
};

// Eight packed columns.
struct Columns {
    int segment;
    int source, count;       // first column in x, and how many from there on belong to the segment; none beyond the width
};

SQ_INLINE Columns columns_at(const Input& in, int place) {
    Columns c = {0, place, 0};
    if (place >= in.width) return c;
#if INPUT == 3  // codes are packed already
    c.count = in.width - place;
#elif SEGMENTED
    while (c.segment + 1 < in.segments && place >= in.packed[c.segment + 1]) ++c.segment;
    c.source = in.source[c.segment] + place - in.packed[c.segment];
    c.count = in.source[c.segment + 1] - c.source;
#else
    c.count = in.columns - place;
#endif
    return c;
}

// A vector of x; columns that do not exist are zero.
SQ_INLINE Raw load_vector(const Input& in, int token, int vector) {
    Raw raw = {};
    const Columns c = columns_at(in, vector * VECTOR);
    const uint8* const from = in.x + token * in.row_bytes + (int64)c.source * IN_BYTES;
#if ALIGNED
    if (c.count < VECTOR) return raw;
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
        const Words4 v = load_constant(from + 16 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) raw.word[4 * i + j] = v.word[j];
    }
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i >= c.count) continue;
#if INPUT == 2
        raw.word[i] = ((const uint32*)from)[i];
#else
        raw.word[i / 2] |= (uint32)((const uint16*)from)[i] << (i % 2 * 16);
#endif
    }
#endif
    return raw;
}
