// What joins the branches of a transformer block: residual + gate * x, and two tensors side by side of which the second
// passes a GELU first. Sixteen bytes at a time, rounded wherever the model would write a tensor.
//
// Fixed when compiled:
//   INPUT  0 bfloat16, 1 float16
//   PARTS  sixteen bytes that a thread has on their way
//   ACROSS sixteen bytes of a row of y: a division by it is a product then
//   LEFT   of a row of the first of two tensors side by side
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define THREADS 256

// A fused product and sum rounds once: adding -0, or multiplying with 1, changes nothing.
SQ_INLINE uint32 product_of(uint32 a, uint32 b) { return INPUT ? halfx2_fma(a, b, 0x80008000u) : bfloat16x2_fma(a, b, 0x80008000u); }
SQ_INLINE uint32 sum_of(uint32 a, uint32 b) { return INPUT ? halfx2_fma(a, 0x3c003c00u, b) : bfloat16x2_fma(a, 0x3f803f80u, b); }

SQ_INLINE float to_float(uint32 pair, int i) { return INPUT ? half_to_float((uint16)(pair >> 16 * i)) : bfloat16_to_float((uint16)(pair >> 16 * i)); }
SQ_INLINE uint32 rounded_pair(float low, float high) { return INPUT ? floats_to_halfx2(low, high) : floats_to_bfloat16x2(low, high); }

extern "C" __global__ void __launch_bounds__(THREADS) gated_sum(
    const uint8* __restrict__ x,         // (rows, columns)
    const uint8* __restrict__ residual,  // (rows, columns)
    const uint8* __restrict__ gate,      // (images, columns)
    uint8* __restrict__ y,               // (rows, columns)
    int parts,                           // of sixteen bytes, in all
    int rows_of_image
) {
    const uint32 first = blockIdx.x * (THREADS * PARTS) + threadIdx.x;
    uint32 a[PARTS][4] = {}, b[PARTS][4] = {}, g[PARTS][4] = {};
#pragma unroll
    for (int k = 0; k < PARTS; ++k) {
        const uint32 part = first + k * THREADS, row = part / ACROSS, column = part % ACROSS;
        const bool here = part < (uint32)parts;
        load_constant_if(here, a[k], x + (int64)part * 16);
        load_constant_if(here, b[k], residual + (int64)part * 16);
        load_constant_if(here, g[k], gate + ((int64)(row / (uint32)rows_of_image) * ACROSS + column) * 16);
    }
#pragma unroll
    for (int k = 0; k < PARTS; ++k) {
        const uint32 part = first + k * THREADS;
        Words4 made;
#pragma unroll
        for (int i = 0; i < 4; ++i) made.word[i] = sum_of(b[k][i], product_of(g[k][i], a[k][i]));
        if (part < (uint32)parts) *(Words4*)(y + (int64)part * 16) = made;
    }
}

// GELU by tanh: x * sigmoid(x * p(x * x)), p with the factor log2(e).
SQ_INLINE uint32 gelu_of(uint32 pair) {
    float made[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float v = to_float(pair, i), p = fmaf(__fmul_rn(v, v), .10294324f, 2.3022082f);
        made[i] = __fmul_rn(v, approximate_reciprocal(__fadd_rn(1.f, approximate_exp2(fminf(__fmul_rn(-v, p), 63.f)))));
    }
    return rounded_pair(made[0], made[1]);
}

extern "C" __global__ void __launch_bounds__(THREADS) beside_gelu(
    const uint8* __restrict__ a,  // (rows, left)
    const uint8* __restrict__ b,  // (rows, right), before its GELU
    uint8* __restrict__ y,        // (rows, left + right)
    int parts                     // of sixteen bytes, in all
) {
    const uint32 first = blockIdx.x * (THREADS * PARTS) + threadIdx.x;
    uint32 raw[PARTS][4] = {};
    bool active[PARTS];
#pragma unroll
    for (int k = 0; k < PARTS; ++k) {
        const uint32 part = first + k * THREADS, row = part / ACROSS, column = part % ACROSS;
        active[k] = (int)column >= LEFT;
        load_constant_if(part < (uint32)parts, raw[k], active[k] ? b + ((int64)row * (ACROSS - LEFT) + column - LEFT) * 16 : a + ((int64)row * LEFT + column) * 16);
    }
#pragma unroll
    for (int k = 0; k < PARTS; ++k) {
        const uint32 part = first + k * THREADS;
        if (active[k])
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[k][i] = gelu_of(raw[k][i]);
        if (part < (uint32)parts) *(Words4*)(y + (int64)part * 16) = Words4{{raw[k][0], raw[k][1], raw[k][2], raw[k][3]}};
    }
}
