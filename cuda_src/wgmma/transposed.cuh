// Rows of y are columns of the sums when w is wgmma's A: the way out turns them.
#pragma once
#include "wgmma/epilogue.cuh"
#include "wgmma/int4.cuh"

// As store_blocks, each block transposed.
SQ_INLINE void store_blocks_transposed(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// 16 tokens of a box of y: rows of 64 channels, 128 bytes. A warpgroup's sums as pairs[j][h]: channel
// 16 warp + lane / 4 + 8h, tokens 8j + 2 (lane % 4) + {0, 1}.
template <int tokens>
SQ_INLINE void stage_turned(uint32 box, int warp, int lane, const uint32 (&pairs)[2][2]) {
    store_blocks_transposed(box + turned_row(warp, lane), pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]);
}

// The same of floats, 32 channels to a row: two boxes, `tokens` rows apart.
template <int tokens>
SQ_INLINE void stage_turned(uint32 boxes, int warp, int lane, const float2 (&pairs)[2][2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int channel = 16 * warp + lane / 4 + 8 * h;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint32 to = boxes + turned_float(8 * j + lane % 4 * 2 + e, channel, tokens);
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(e ? pairs[j][h].y : pairs[j][h].x) : "memory");
            }
        }
}

// All threads of a warpgroup meet. Barrier 0 is __syncthreads.
SQ_INLINE void meet_warpgroup(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
