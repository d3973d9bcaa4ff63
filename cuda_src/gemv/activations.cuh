// Activations, eight columns at a time, wherever they start; SiLU on the way, if wanted.
#pragma once
#include "common/int4.cuh"
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define IN_BYTES (INPUT == 2 ? 4 : 2)
#define WORDS (2 * IN_BYTES)  // of 8 values

struct Words2 { uint32 word[2]; };

struct Raw { uint32 word[WORDS]; };

// The eight values from `from` on, of which the first `count` exist; the others are zero.
SQ_INLINE Raw load8(const uint8* from, int count) {
    Raw raw = {};
#if ALIGNED
    if (count < 8) return raw;
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
        const Words4 v = load_constant(from + 16 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) raw.word[4 * i + j] = v.word[j];
    }
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i >= count) continue;
#if INPUT == 2
        raw.word[i] = ((const uint32*)from)[i];
#else
        raw.word[i / 2] |= (uint32)((const uint16*)from)[i] << (i % 2 * 16);
#endif
    }
#endif
    return raw;
}

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
#if SEGMENTED
    while (c.segment + 1 < in.segments && place >= in.packed[c.segment + 1]) ++c.segment;
    c.source = in.source[c.segment] + place - in.packed[c.segment];
    c.count = in.source[c.segment + 1] - c.source;
#else
    c.count = in.columns - place;
#endif
    return c;
}


// Which warps read which token: all of them the only one, or eight of them each of two, … or one of them each.
struct Share { int token, tokens_apart, first, step; };  // first vector of a thread, and how far to its next one

template <int warps> SQ_INLINE Share share_tokens(int tokens) {
    int each = warps, bits = 0;  // warps per token: warps / 2^bits
#pragma unroll
    for (int apart = 1; apart < warps; apart *= 2)
        if (apart < tokens) {
            each /= 2;
            ++bits;
        }
    const int warp = threadIdx.x / 32;
    Share s;
    s.tokens_apart = 1 << bits;
    s.token = warp * s.tokens_apart / warps;
    s.first = (warp & each - 1) * 32 + (int)threadIdx.x % 32;
    s.step = each * 32;
    return s;
}

// What a thread reads at a time, before it uses any of it: memory is far away.
#define AHEAD 4
template <class Vector> struct Batch { Vector of[AHEAD]; };

// From vector v of a token on, `step` vectors apart; SiLU comes later.
SQ_INLINE Batch<Raw> read_values(const Input& in, int token, int v, int step) {
    Batch<Raw> batch;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const Columns c = columns_at(in, (v + i * step) * 8);
        batch.of[i] = load8(in.x + token * in.row_bytes + (int64)c.source * IN_BYTES, c.count);
    }
    return batch;
}

// The same of codes, 16 of them to a vector.
SQ_INLINE Batch<Words4> read_codes(const Input& in, int token, int v, int step) {
    Batch<Words4> batch = {};
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (v + i * step < in.width / 16) batch.of[i] = load_constant(in.x + token * in.row_bytes + (v + i * step) * 16);
    return batch;
}

SQ_INLINE Words4 activated(const Words4& codes) { return codes; }

template <class Vector> SQ_INLINE Batch<Vector> activated(const Batch<Vector>& batch) {
    Batch<Vector> result;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) result.of[i] = activated(batch.of[i]);
    return result;
}

// What a thread will use first.
template <int warps, class Read> SQ_INLINE auto read_first(const Input& in, int tokens, Read read) {
    const Share share = share_tokens<warps>(tokens);
    decltype(read(in, 0, 0, 0)) nothing = {};
    return share.token < tokens ? read(in, share.token, share.first, share.step) : nothing;
}

// Calls `use(token, vector, values)` for the vectors of a thread, all lanes of a warp together, some of them perhaps beyond the last vector;
// then `done(token)`. `first` has been read and activated before; others are read while the ones before them are used.
template <int warps, class Vector, class Read, class Use, class Done>
SQ_INLINE void for_vectors(const Input& in, int tokens, int vectors, const Batch<Vector>& first, Read read, Use use, Done done) {
    const Share share = share_tokens<warps>(tokens);
    const int lane = threadIdx.x % 32;
    Batch<Vector> batch = first;
#pragma unroll 1
    for (int token = share.token; token < tokens; token += share.tokens_apart) {
#pragma unroll 1
        for (int v = share.first; v - lane < vectors; v += AHEAD * share.step) {
            const bool last = v - lane + AHEAD * share.step >= vectors;
            const int next_token = last ? token + share.tokens_apart : token, next = last ? share.first : v + AHEAD * share.step;
            Batch<Vector> coming = {};
            if (next_token < tokens) coming = read(in, next_token, next, share.step);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (v - lane + i * share.step < vectors) use(token, v + i * share.step, batch.of[i]);
            if (next_token < tokens) batch = activated(coming);
        }
        done(token);
    }
}
