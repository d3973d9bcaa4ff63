// Numbers: 16-bit floats to float and back, the 8-bit float E4M3, and codes rounded exactly as
// segquant_nb.formats.encode rounds them.
#pragma once
#include "common/device.cuh"

#ifdef __CUDACC__
SQ_INLINE float half_to_float(uint16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Two floats to two 16-bit ones, the first in the low half; rounded half to even.
SQ_INLINE uint32 floats_to_bfloat16x2(float low, float high) {
    uint32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
SQ_INLINE uint32 floats_to_halfx2(float low, float high) {
    uint32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Unlike fmaxf and fminf these keep a NaN.
SQ_INLINE float max_or_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
SQ_INLINE float min_or_nan(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// 1/x, off by one unit in the last place at most.
SQ_INLINE float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The larger, and the smaller, of two pairs of 16-bit floats; a number rather than a NaN.
SQ_INLINE uint32 bfloat16x2_max(uint32 a, uint32 b) {
    uint32 result;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 bfloat16x2_min(uint32 a, uint32 b) {
    uint32 result;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 halfx2_max(uint32 a, uint32 b) {
    uint32 result;
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 halfx2_min(uint32 a, uint32 b) {
    uint32 result;
    asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
// The same, but a NaN rather than a number.
SQ_INLINE uint32 bfloat16x2_max_or_nan(uint32 a, uint32 b) {
    uint32 result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 bfloat16x2_min_or_nan(uint32 a, uint32 b) {
    uint32 result;
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 halfx2_max_or_nan(uint32 a, uint32 b) {
    uint32 result;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
SQ_INLINE uint32 halfx2_min_or_nan(uint32 a, uint32 b) {
    uint32 result;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// a * b + c, rounded once.
SQ_INLINE uint32 bfloat16x2_fma(uint32 a, uint32 b, uint32 c) {
    uint32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
SQ_INLINE uint32 halfx2_fma(uint32 a, uint32 b, uint32 c) {
    uint32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// 2^x, off by two units in the last place at most.
SQ_INLINE float approximate_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#endif

SQ_INLINE float bfloat16_to_float(uint16 bits) { return __uint_as_float((uint32)bits << 16); }

SQ_INLINE bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }

// |x| as an integer that orders as |x| does; 0 for NaN and infinity, which do not count.
SQ_INLINE uint32 finite_magnitude(float x) {
    uint32 magnitude = __float_as_uint(x) & 0x7fffffffu;
    return magnitude < 0x7f800000u ? magnitude : 0u;
}

// formats._usable: where everything is zero any scale will do, and none is subnormal.
SQ_INLINE float usable_scale(float scale) {
    return scale > 0.f ? (scale < 1.17549435e-38f ? 1.17549435e-38f : scale) : 1.f;
}

// range/magnitude to multiply by, right to 4e-7, or NaN where it could be further off.
SQ_INLINE float inverse_scale(float magnitude, float range) {
    float inverse = range * approximate_reciprocal(magnitude);
    return magnitude > 0x1p-100f && magnitude < 0x1p100f ? inverse : __uint_as_float(0x7fc00000u);
}

// Adding 1.5 * 2^23 to a small float rounds it half to even, to an integer in the low bits.
#define SQ_ROUNDER 12582912.f

// The code of x as the low byte of the result. A true division costs more than all the rest of
// a quantization pass, and is needed only next to a tie: where x/scale and x * inverse, which differ
// by less than 5e-7 of themselves, could round to different integers. `doubtful` is set there,
// and for NaN; otherwise it is left alone.
SQ_INLINE uint32 code_by_product(float x, float inverse, float lowest, float highest, bool& doubtful) {
    float quotient = min_or_nan(max_or_nan(__fmul_rn(x, inverse), lowest), highest);
    float rounded = __fadd_rn(quotient, SQ_ROUNDER);
    float from_integer = __fsub_rn(quotient, __fsub_rn(rounded, SQ_ROUNDER));
    doubtful |= !(fmaf(fabsf(quotient), 0x1p-20f, fabsf(from_integer)) < 0.5f);
    return __float_as_uint(rounded);
}

// The same by the definition: divided, rounded half to even, clamped; NaN becomes 0.
SQ_INLINE uint32 code_by_division(float x, float scale, float lowest, float highest) {
    float quotient = __fdiv_rn(x, scale);
    quotient = is_nan(quotient) ? 0.f : min_or_nan(max_or_nan(quotient, lowest), highest);
    return __float_as_uint(__fadd_rn(quotient, SQ_ROUNDER));
}

// Two floats to E4M3, the first in the low byte: 4 bits of exponent, 3 of mantissa, half to even,
// at most 448.
SQ_INLINE uint32 floats_to_e4m3x2(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    uint16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    uint32 pair = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x = i ? high : low;
        uint32 sign = __float_as_uint(x) >> 24 & 0x80u, magnitude = __float_as_uint(x) & 0x7fffffffu, code;
        if (magnitude > 0x7f800000u) code = 0x7fu;
        else if (magnitude > 0x43e00000u) code = 0x7eu;  // 448
        else if (magnitude < 0x3c800000u)  // below 2^-6 the step is 2^-9
            code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude) * 512.f, SQ_ROUNDER)) & 0xfu;
        else  // half to even at the third bit of the mantissa; the exponent's bias: 127 becomes 7
            code = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) >> 20) - (120u << 3);
        pair |= (sign | code) << (8 * i);
    }
    return pair;
#endif
}

// Like code_by_product: doubtful where a quotient a little smaller and one a little larger round apart.
SQ_INLINE uint32 e4m3_by_product(float x, float inverse, bool& doubtful) {
    float quotient = __fmul_rn(x, inverse);
    uint32 pair = floats_to_e4m3x2(__fmul_rn(quotient, 1.f - 0x1p-20f), __fmul_rn(quotient, 1.f + 0x1p-20f));
    doubtful |= (pair & 0xffu) != pair >> 8 || is_nan(inverse);
    return pair & 0xffu;
}
SQ_INLINE uint32 e4m3_by_division(float x, float scale) { return floats_to_e4m3x2(__fdiv_rn(x, scale), 0.f) & 0xffu; }
