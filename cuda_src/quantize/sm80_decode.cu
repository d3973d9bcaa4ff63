// Codes of a weight to the values that they stand for, in 16 bits: one read, one write.
//
//   W_BITS   8 or 4: int8 codes, or two int4 codes in a byte
//   OUTPUT   0: bfloat16, 1: float16
//
// A thread has 16 columns, which share a scale, since scales change at multiples of 32 columns. Both sides stay
// in packed columns, so that a row of values starts where its row of codes does.
#include "common/int4.cuh"
#include "common/numbers.cuh"

SQ_INLINE uint32 two_values(uint32 codes, int first, float scale) {
    const float low = (float)(int8)(codes >> 8 * first & 0xffu) * scale;
    const float high = (float)(int8)(codes >> 8 * (first + 1) & 0xffu) * scale;
    return OUTPUT == 0 ? floats_to_bfloat16x2(low, high) : floats_to_halfx2(low, high);
}

extern "C" __global__ void decode(
    const uint8* __restrict__ codes,    // (N, width) int8, or (N, width/2)
    const float* __restrict__ scale_w,  // (granules, N), or (N,)
    const int* __restrict__ granules,   // (width/32,) the row of scale_w; null: one for all
    uint16* __restrict__ values,        // (N, width)
    int N,
    int vectors) {                      // of 16 columns, in a row
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const int vector = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= N || vector >= vectors) return;
    const int64 at = (int64)row * vectors + vector;
    const float scale = scale_w[(granules ? (int64)granules[vector / 2] * N : 0) + row];
    Words4 in;
    if (W_BITS == 8) {
        in = ((const Words4*)codes)[at];
    } else {
        struct alignas(8) Words2 { uint32 word[2]; } half = ((const Words2*)codes)[at];
        unpack_int4x8(half.word[0], in.word[0], in.word[1]);
        unpack_int4x8(half.word[1], in.word[2], in.word[3]);
    }
    Words4* out = (Words4*)values + 2 * at;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Words4 made;
#pragma unroll
        for (int i = 0; i < 4; ++i) made.word[i] = two_values(in.word[2 * half + i / 2], i % 2 * 2, scale);
        out[half] = made;
    }
}
