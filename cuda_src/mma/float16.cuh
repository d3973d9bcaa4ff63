// 16-bit floats on tensor cores, sm_80 and later: a 16x8x16 product, and pairs of codes as pairs of floats.
#pragma once
#include "common/memory.cuh"

#ifdef __CUDACC__
// sum += a (16x16) times b (16x8), of bfloat16 or float16, summed in float32.
template <bool half> SQ_INLINE void multiply_add_float16(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    if (half)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a - b for two pairs of 16-bit floats. For bfloat16 sm_80 has a fused multiply-add only.
template <bool half> SQ_INLINE uint32 subtract_float16x2(uint32 a, uint32 b) {
    uint32 result;
    if (half) asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return result;
}
#endif

// Two int8 codes, in the low byte of each half of a word, as two 16-bit floats; exact. What lies in the high
// bytes does not matter.
template <bool half> SQ_INLINE uint32 codes8_to_float16x2(uint32 codes) {
    // float16: 0x6400 + u is 1024 + u; flip the sign and u is the code + 128.
    if (half) return subtract_float16x2<true>((codes & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
    // bfloat16 has room for 7 bits: 0x4300 + u is 128 + u. The sign bit makes the other number 128 or 256.
    return subtract_float16x2<false>((codes & 0x007f007fu) | 0x43004300u, (codes & 0x00800080u) | 0x43004300u);
}

// The same for int4 codes, in the low half-byte of each half of a word.
template <bool half> SQ_INLINE uint32 codes4_to_float16x2(uint32 codes) {
    const uint32 base = half ? 0x64006400u : 0x43004300u;
    return subtract_float16x2<half>(((codes & 0x000f000fu) ^ 0x00080008u) | base, base | 0x00080008u);
}
