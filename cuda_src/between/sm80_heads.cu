// What an attention layer does to its queries and keys before they meet: the norm of each head, and the rotation that
// tells it where a token is. One read, one write; PyTorch makes ten passes of the rotation.
//
// Fixed when compiled:
//   INPUT    0 bfloat16, 1 float16
//   COLUMNS  of a head, a multiple of 8
//   WEIGHT   the norm has a weight for each column
//   ROUNDED  it multiplies what was rounded to the type of x, as diffusers does; PyTorch's own norm rounds once
//   ROWS     rows that a thread has a part of (norm); heads that are on their way at a time (rotation)
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define THREADS 256
#define PIECES (COLUMNS / 8)  // of a row, sixteen bytes each
#define LANES (PIECES > 16 ? 32 : PIECES > 8 ? 16 : PIECES > 4 ? 8 : PIECES > 2 ? 4 : PIECES > 1 ? 2 : 1)  // that share a row

SQ_INLINE void to_floats(float (&v)[8], const uint32 (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = INPUT ? half_to_float((uint16)(raw[i / 2] >> (i % 2 * 16))) : bfloat16_to_float((uint16)(raw[i / 2] >> (i % 2 * 16)));
}

SQ_INLINE uint32 rounded_pair(float low, float high) { return INPUT ? floats_to_halfx2(low, high) : floats_to_bfloat16x2(low, high); }

SQ_INLINE Words4 from_floats(const float (&v)[8]) {
    return Words4{{rounded_pair(v[0], v[1]), rounded_pair(v[2], v[3]), rounded_pair(v[4], v[5]), rounded_pair(v[6], v[7])}};
}

// Rows one after the other; LANES threads share a row, and all threads of a warp stay to the end: they add up together.
extern "C" __global__ void __launch_bounds__(THREADS) rms_heads(
    const uint8* __restrict__ x,       // (rows, COLUMNS)
    const uint8* __restrict__ weight,  // (COLUMNS,), in the type of x
    uint8* __restrict__ y,             // (rows, COLUMNS)
    int64 rows,
    float eps
) {
    const int lane = threadIdx.x % LANES;
    const bool here = lane < PIECES;
    const int64 first = (int64)blockIdx.x * (THREADS / LANES * ROWS) + threadIdx.x / LANES;
    uint32 raw[ROWS][4] = {}, factors[4] = {};
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const int64 row = first + k * (THREADS / LANES);
        load_constant_if(here && row < rows, raw[k], x + (row * COLUMNS + lane * 8) * 2);
    }
    if (WEIGHT) load_constant_if(here, factors, weight + lane * 16);
    float w[8];
    to_floats(w, factors);
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const int64 row = first + k * (THREADS / LANES);
        float v[8], square[8];
        to_floats(v, raw[k]);
#pragma unroll
        for (int i = 0; i < 8; ++i) square[i] = __fmul_rn(v[i], v[i]);
#pragma unroll
        for (int n = 4; n; n /= 2)
#pragma unroll
            for (int i = 0; i < n; ++i) square[i] = __fadd_rn(square[i], square[i + n]);
        float sum = square[0];
#pragma unroll
        for (int n = LANES / 2; n; n /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, n));
        const float factor = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)COLUMNS), eps)));
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], factor);
#if WEIGHT && ROUNDED
        const Words4 once = from_floats(v);
        to_floats(v, once.word);
#endif
#if WEIGHT
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], w[i]);
#endif
        if (here && row < rows) *(Words4*)(y + (row * COLUMNS + lane * 8) * 2) = from_floats(v);
    }
}

// A thread has eight columns of a token and goes through its heads, so that cosines and sines are read once for all of
// them. y has the layout of x: `token_bytes` from one token to the next, `head_bytes` from one head to the next.
extern "C" __global__ void __launch_bounds__(THREADS) rotate_heads(
    const uint8* __restrict__ x,  // (images, tokens, heads, COLUMNS) or (images, heads, tokens, COLUMNS)
    const float* __restrict__ cosines,  // (tokens, COLUMNS)
    const float* __restrict__ sines,    // (tokens, COLUMNS)
    uint8* __restrict__ y,
    int tokens,
    int heads,
    int64 image_bytes,
    int64 token_bytes,
    int64 head_bytes,
    int count,        // tokens of all images
    int heads_at_once  // of a block; blocks side by side share the heads of a token
) {
    const int64 place = (int64)blockIdx.x * THREADS + threadIdx.x;
    const int token = (int)(place / PIECES), piece = (int)(place % PIECES);
    if (token >= count) return;
    const int position = token % tokens, end = (blockIdx.y + 1) * heads_at_once < heads ? (blockIdx.y + 1) * heads_at_once : heads;
    const int64 start = token / tokens * image_bytes + position * token_bytes + piece * 16;
    float c[8], s[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const int64 at = (int64)position * COLUMNS + piece * 8 + i;
        const Words4 cosine = load_constant(cosines + at), sine = load_constant(sines + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) c[i + j] = __uint_as_float(cosine.word[j]), s[i + j] = __uint_as_float(sine.word[j]);
    }
    for (int head = blockIdx.y * heads_at_once; head < end; head += ROWS) {
        uint32 raw[ROWS][4] = {};
#pragma unroll
        for (int k = 0; k < ROWS; ++k) load_constant_if(head + k < end, raw[k], x + start + (head + k) * head_bytes);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            float v[8], turned[8];
            to_floats(v, raw[k]);
#pragma unroll
            for (int i = 0; i < 8; i += 2) {  // two products, each rounded, and their sum: as PyTorch computes it
                turned[i] = __fadd_rn(__fmul_rn(v[i], c[i]), __fmul_rn(-v[i + 1], s[i]));
                turned[i + 1] = __fadd_rn(__fmul_rn(v[i + 1], c[i + 1]), __fmul_rn(v[i], s[i + 1]));
            }
            if (head + k < end) *(Words4*)(y + start + (head + k) * head_bytes) = from_floats(turned);
        }
    }
}
