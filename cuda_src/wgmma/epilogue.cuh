// From int32 sums in registers to scaled floats in shared memory, ready for the copy engine.
#pragma once
#include "common/numbers.cuh"
#include "tma/copy.cuh"
#include "wgmma/layout.cuh"

// The type of y. A pair of 16-bit values is one register, the first one in the low half.
template <int output> struct Output;

template <> struct Output<0> {  // bfloat16
    typedef uint32 Pair;
    typedef uint16 Value;
    static SQ_INLINE Pair pack(float first, float second) { return floats_to_bfloat16x2(first, second); }
    static SQ_INLINE float first(Pair pair) { return bfloat16_to_float((uint16)pair); }
    static SQ_INLINE float second(Pair pair) { return bfloat16_to_float((uint16)(pair >> 16)); }
};

template <> struct Output<1> {  // float16
    typedef uint32 Pair;
    typedef uint16 Value;
    static SQ_INLINE Pair pack(float first, float second) { return floats_to_halfx2(first, second); }
    static SQ_INLINE float first(Pair pair) { return half_to_float((uint16)pair); }
    static SQ_INLINE float second(Pair pair) { return half_to_float((uint16)(pair >> 16)); }
};

template <> struct Output<2> {  // float32
    typedef float2 Pair;
    typedef float Value;
    static SQ_INLINE Pair pack(float first, float second) { return {first, second}; }
    static SQ_INLINE float first(Pair pair) { return pair.x; }
    static SQ_INLINE float second(Pair pair) { return pair.y; }
};

// Values at offset and offset + 1, or zero where fewer than that are `left`. An offset known when
// compiled costs no register.
template <class Pair, class Value> SQ_INLINE Pair load_pair(const Value* values, int offset, int left) {
    return offset < left ? __ldg(reinterpret_cast<const Pair*>(values + offset)) : Pair();
}

SQ_INLINE float2 pair_at(const float* values) { return *reinterpret_cast<const float2*>(values); }

// One term of y. Each product is rounded once, as in segquant_nb.gemm.w8a8_reference: all paths agree in every bit.
SQ_INLINE float scaled_term(float sum, float scale_x, float scale_w) {
    return __fmul_rn(sum, __fmul_rn(scale_x, scale_w));
}
SQ_INLINE float scaled_term(int sum, float scale_x, float scale_w) {
    return scaled_term(__int2float_rn(sum), scale_x, scale_w);
}

// Four 8×8 blocks of 16-bit values, one register each, to the rows whose addresses the lanes give.
SQ_INLINE void store_blocks(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// One warp's 16 rows × 128 bytes: pairs[j][h] are row lane / 4 + 8h, columns 8j + 2 (lane % 4) + {0, 1}.
SQ_INLINE void stage_box(uint32 box, int lane, const uint32 (&pairs)[8][2]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_blocks(box + swizzled(lane % 16, j + lane / 16), pairs[j][0], pairs[j][1], pairs[j + 1][0],
                     pairs[j + 1][1]);
}

SQ_INLINE void stage_box(uint32 box, int lane, const float2 (&pairs)[4][2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32 address = box + swizzled(lane / 4 + 8 * h, 2 * j + lane % 4 / 2) + lane % 2 * 8;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pairs[j][h].x), "f"(pairs[j][h].y)
                         : "memory");
        }
}
