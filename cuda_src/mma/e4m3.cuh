// Tensor cores for the 8-bit float E4M3, sm_89 and later.
#pragma once
#include "common/device.cuh"

#ifdef __CUDACC__
// sum += a (16x32) times b (32x8), of E4M3, summed in float32. The name and the fragments are those of int8.
SQ_INLINE void multiply_add(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
