// Values of a result in memory. OUTPUT: 0 bfloat16, 1 float16, 2 float32.
#pragma once
#include "common/numbers.cuh"

SQ_INLINE void store_value(void* y, int64 at, float value) {
#if OUTPUT == 2
    ((float*)y)[at] = value;
#else
    ((uint16*)y)[at] = (uint16)(OUTPUT == 1 ? floats_to_halfx2(value, 0.f) : floats_to_bfloat16x2(value, 0.f));
#endif
}

SQ_INLINE float load_value(const void* y, int64 at) {
#if OUTPUT == 2
    return ((const float*)y)[at];
#else
    const uint16 bits = ((const uint16*)y)[at];
    return OUTPUT == 1 ? half_to_float(bits) : bfloat16_to_float(bits);
#endif
}
