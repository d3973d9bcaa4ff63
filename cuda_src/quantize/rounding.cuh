// Values to codes, sixteen at a time, exactly as segquant_nb.formats.encode rounds them, with hardly a division.
#pragma once
#include "common/int4.cuh"
#include "common/numbers.cuh"

#define QUARTZ (FORMAT >= 4)
#define PATHS (DUAL ? 2 : 1)
#if FORMAT == 1 || FORMAT == 2
#define HIGHEST 7.f
#define LOWEST -8.f
#elif FORMAT == 3
#define HIGHEST 448.f
#define LOWEST -448.f
#else
#define HIGHEST 127.f
#define LOWEST (QUARTZ ? -127.f : -128.f)
#endif

// The steps of sixteen values, by polarity, with what the quotients need.
struct Steps {
    float scale[PATHS], inverse[PATHS];
    bool safe;   // far from the ends of float32, where an intermediate result could overflow or lose bits
    bool quick;  // no product with the inverse rounds to another code than the quotient
};

// What a magnitude is divided by to become a scale.
SQ_INLINE float code_range(bool below) { return below ? -LOWEST : HIGHEST; }

// magnitude / code_range, rounded once: the remainder of a first guess is exact, and corrects it.
SQ_INLINE float scale_for(float magnitude, bool below) {
    const float range = code_range(below), part = below ? 1.f / -LOWEST : 1.f / HIGHEST;
    const float guess = __fmul_rn(magnitude, part);
    const float scale = fmaf(fmaf(-range, guess, magnitude), part, guess);
    return usable_scale(magnitude > 0x1p-100f ? scale : __fdiv_rn(magnitude, range));
}

// Values of 8 or 11 bits are divided by a scale that is one of them, over 127 or 7, rounded. Against a tie n/2, of an odd n, a
// quotient is off by 2^-20 of itself at least, far more than a product can lose; unless it *is* a tie, but for the
// scale's own rounding. So it is for n = 127 (or 7), which is half of the largest value: that one is tried. And it is for other n
// if the scale came out exact. The scale over 128 (or 8), of negative values, always does: then a product finds the tie if the
// inverse is close enough, or if the only n is 1, since an odd number of 8 bits times 3 has more than 8.
#define FEW_BITS (DYNAMIC && !SMOOTH && !ROTATE && INPUT != 2 && FORMAT != 3)
SQ_INLINE bool is_quick(float magnitude, float scale, float inverse, bool below) {
    if (below) return __float_as_uint(magnitude) >> (INPUT ? 13 : 16) & 1u || fabsf(fmaf(-scale, inverse, 1.f)) <= 0x1p-25f;
    const float half = .5f * magnitude, near = __fmul_rn(half, inverse);
    return fmaf(-HIGHEST, scale, magnitude) != 0.f && (near < .5f * HIGHEST) == (fmaf(fmaf(-scale, near, half), inverse, near) < .5f * HIGHEST);
}

SQ_INLINE Steps steps_of(const float (&scale)[PATHS]) {
    Steps s;
    s.safe = true;
    s.quick = false;
#pragma unroll
    for (int p = 0; p < PATHS; ++p) {
        s.scale[p] = scale[p];
        s.inverse[p] = __frcp_rn(scale[p]);
        s.safe = s.safe && scale[p] > 0x1p-100f && scale[p] < 0x1p100f;
    }
    return s;
}

// The largest and the smallest of some values, as the bits of floats, zero between them. Integers compare faster than floats.
struct Extent { uint32 high, low; };

SQ_INLINE bool is_finite(const Extent& e) { return e.high < 0x7f800000u && e.low < 0xff800000u; }

// What the values of a thread allow: `clear` to divide them without accidents, `inside` that no quotient has to be clamped.
struct Allowed { bool clear, inside; };

SQ_INLINE Allowed allowed_by(const Steps& steps, const Extent& extent) {
    const float most = __uint_as_float(extent.high) * steps.inverse[0], least = __uint_as_float(extent.low) * steps.inverse[PATHS - 1];
    const bool clear = steps.safe && is_finite(extent) && most < 0x1p20f && least > -0x1p20f;
    // A scale that was found in the row itself needs no clamp.
    return {clear, clear && (DYNAMIC || (most <= HIGHEST && least >= LOWEST))};
}

// Sixteen values to quotients value/scale, each rounded once, as a division would. If `inverse` is 1/scale rounded once, the
// product is off by one unit in the last place at most, its remainder is exact, and the remainder times the inverse
// mends it (Markstein, 1990). A division takes many more instructions, and only the accidents need it.
SQ_INLINE void divide(float (&value)[16], const Steps& steps, const Allowed& allowed) {
    if (FEW_BITS && allowed.clear && steps.quick) {
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = __fmul_rn(value[i], DUAL && value[i] < 0.f ? steps.inverse[PATHS - 1] : steps.inverse[0]);
    } else if (allowed.clear) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const bool below = DUAL && value[i] < 0.f;  // no index: that would put the steps into memory
            const float scale = below ? steps.scale[PATHS - 1] : steps.scale[0], inverse = below ? steps.inverse[PATHS - 1] : steps.inverse[0];
            const float near = __fmul_rn(value[i], inverse);
            value[i] = fmaf(fmaf(-scale, near, value[i]), inverse, near);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = __fdiv_rn(value[i], DUAL && value[i] < 0.f ? steps.scale[PATHS - 1] : steps.scale[0]);
    }
#if FORMAT != 3
    if (!allowed.inside) {  // NaN becomes zero
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = is_nan(value[i]) ? 0.f : fminf(fmaxf(value[i], LOWEST), HIGHEST);
    }
#endif
    __syncwarp();  // some lanes may have been away
}

// Sixteen small numbers to integers in bytes, half to even: beyond 1.5 * 2^23 a float has no fraction, and its low bits count.
SQ_INLINE void round_to_bytes(uint32 (&word)[4], const float (&quotient)[16], float unit = 1.f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32 code[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) code[j] = __float_as_uint(fmaf(quotient[4 * i + j], unit, SQ_ROUNDER));
        word[i] = pick_bytes(pick_bytes(code[0], code[1], 0x0040), pick_bytes(code[2], code[3], 0x0040), 0x5410);
    }
}

SQ_INLINE void round_to_e4m3(uint32 (&word)[4], const float (&quotient)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
        word[i / 4] = pick_bytes(floats_to_e4m3x2(quotient[i], quotient[i + 1]), floats_to_e4m3x2(quotient[i + 2], quotient[i + 3]), 0x5410);
}

// Four bytes at once: 0xff where one is negative.
SQ_INLINE uint32 signs_of(uint32 bytes) {
#ifdef __CUDACC__
    uint32 signs;
    asm("prmt.b32 %0, %1, %1, 0xba98;" : "=r"(signs) : "r"(bytes));
    return signs;
#else
    return (bytes >> 7 & 0x01010101u) * 0xffu;
#endif
}

// Of four codes in -127 ... 127 the magnitudes.
SQ_INLINE uint32 magnitudes_of(uint32 bytes, uint32 signs) { return (bytes ^ signs) + (signs & 0x01010101u); }

// By how many bits the largest magnitude of a group of columns must be shifted to fit into three.
SQ_INLINE int shift_of(const uint32 (&word)[4]) {
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= magnitudes_of(word[i], signs_of(word[i]));
    bits |= bits >> 16;
    bits |= bits >> 8;
#if GROUP == 32
    bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
#endif
    const int length = 32 - __clz((int)(bits & 0xffu));
    return length > 3 ? length - 3 : 0;
}

// Towards zero, to a multiple of 2^shift: negative codes are raised before their low bits are cut off. The
// top bits stay out of the sum, so that nothing is carried into the next byte.
SQ_INLINE uint32 drop_low_bits(uint32 bytes, int shift) {
    const uint32 low = ((1u << shift) - 1u) * 0x01010101u;
    return (((bytes & 0x7f7f7f7fu) + (signs_of(bytes) & low)) ^ (bytes & 0x80808080u)) & ~low;
}

// QuaRTZ: what is left of sixteen codes; in packed formats without the zeros at the low end.
SQ_INLINE void drop_bits(uint32 (&word)[4], float (&quotient)[16], int shift) {
#if ROUNDED  // the same quotients in steps 2^shift times as large, of which seven have to do
    const float unit = __uint_as_float((uint32)(127 - shift) << 23), most = __uint_as_float(((uint32)(127 + shift) << 23)) * 7.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) quotient[i] = fminf(fmaxf(quotient[i], -most), most);
    round_to_bytes(word, quotient, unit);
#pragma unroll
    for (int i = 0; FORMAT == 4 && i < 4; ++i) word[i] = word[i] << shift & (0xffu & 0xffu << shift) * 0x01010101u;
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = drop_low_bits(word[i], shift) >> (FORMAT == 5 ? shift : 0);
#endif
}

// Eight codes of 4 bits in the low halves of the bytes of two words, to one word.
SQ_INLINE uint32 pack_halves(uint32 a, uint32 b) {
    a &= 0x0f0f0f0fu;
    b &= 0x0f0f0f0fu;
    return pick_bytes(a | a >> 4, b | b >> 4, 0x6420);
}
