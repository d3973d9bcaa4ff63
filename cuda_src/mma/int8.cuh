// int8 tensor cores, sm_80 and later: fragments from shared memory, and a 16x8x32 product.
#pragma once
#include "common/memory.cuh"

#ifdef __CUDACC__
// Four 8x16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and receives the
// bytes 4 * (l % 4) … of row l / 4 of each.
SQ_INLINE void load_fragments(uint32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)) : "memory");
}

// sum += a (16x32) times b (32x8), all int8, summed in int32.
SQ_INLINE void multiply_add(int (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 0xff in each byte that is negative: a selector with its top bit set replicates the sign.
SQ_INLINE uint32 negative_bytes(uint32 word) {
    uint32 mask;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(mask) : "r"(word));
    return mask;
}
#endif
