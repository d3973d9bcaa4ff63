// Block-Hadamard rotations of a row, in the order of additions of segquant_nb.seglinear.rotate_columns: radix-4
// steps with strides 1, 4, 16, 64, the last step radix 2 where the block is no power of 4.
//
// A thread holds 16 columns side by side, so strides 1 and 4 stay inside of it. For the others the columns change
// hands in shared memory: the threads of a block of 16·L columns each take L that lie 16 apart (and 16/L
// neighbors of each), and for them strides 16 and 64 stay inside of a thread, too.
#pragma once
#include "common/device.cuh"

template <int STRIDE> SQ_INLINE void step_of_four(float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i / STRIDE % 4) continue;
        const float sum = __fadd_rn(__fadd_rn(__fadd_rn(v[i], v[i + STRIDE]), v[i + 2 * STRIDE]), v[i + 3 * STRIDE]);
        const float half = __fmul_rn(sum, .5f);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j * STRIDE] = __fsub_rn(half, v[i + j * STRIDE]);
    }
}

template <int STRIDE> SQ_INLINE void step_of_two(float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i / STRIDE % 2) continue;
        const float a = v[i], b = v[i + STRIDE];
        v[i] = __fmul_rn(__fadd_rn(a, b), .70710678118654752f);
        v[i + STRIDE] = __fmul_rn(__fsub_rn(a, b), .70710678118654752f);
    }
}

SQ_INLINE void rotate_inside(float (&v)[16], int block) {
    if (block >= 4) step_of_four<1>(v);
    else if (block == 2) step_of_two<1>(v);
    if (block >= 16) step_of_four<4>(v);
    else if (block == 8) step_of_two<4>(v);
}

// Where column i lies in shared memory. The gaps keep threads that read or write at the same time on different banks.
#define WINDOW 672  // floats for 512 columns
SQ_INLINE int place_in_window(int i) { return i / 512 * WINDOW + i % 512 + i % 512 / 16 * 4 + (i / 128 % 4 + 1) / 2 * 16; }

template <int LENGTH> struct alignas(4 * LENGTH) Run { float value[LENGTH]; };

// The steps across threads for a block of 16 * L columns that begins at `first`, by the thread with number `mine` in it.
template <int L> SQ_INLINE void rotate_across(float* window, int first, int mine) {
    constexpr int NEIGHBORS = 16 / L, LENGTH = NEIGHBORS < 4 ? NEIGHBORS : 4;
    float v[16];
#if ROTATE == 1  // the blocks of a window begin at multiples of their size: one address, and the rest is known
    float* base = window + place_in_window(first) + mine * NEIGHBORS;
#define RUN(i) (Run<LENGTH>*)(base + (i) / NEIGHBORS * 20 + (i) / NEIGHBORS / 8 * 16 + (i) % NEIGHBORS)
#else
#define RUN(i) (Run<LENGTH>*)(window + place_in_window(first + (i) / NEIGHBORS * 16) + mine * NEIGHBORS + (i) % NEIGHBORS)
#endif
#pragma unroll
    for (int i = 0; i < 16; i += LENGTH) {
        const Run<LENGTH> run = *RUN(i);
#pragma unroll
        for (int j = 0; j < LENGTH; ++j) v[i + j] = run.value[j];
    }
    if (L >= 4) step_of_four<NEIGHBORS>(v);
    if (L == 2 || L == 8) step_of_two<8>(v);
    if (L == 16) step_of_four<4>(v);
#pragma unroll
    for (int i = 0; i < 16; i += LENGTH) {
        Run<LENGTH> run;
#pragma unroll
        for (int j = 0; j < LENGTH; ++j) run.value[j] = v[i + j];
        *RUN(i) = run;
    }
#undef RUN
}

// For sixteen columns from `place` on, in a segment that starts at `start`.
SQ_INLINE void rotate_across(float* window, int place, int start, int block) {
    const int first = place - (place - start & block - 1), mine = (place - first) / 16;
    if (block == 32) rotate_across<2>(window, first, mine);
    if (block == 64) rotate_across<4>(window, first, mine);
    if (block == 128) rotate_across<8>(window, first, mine);
    if (block == 256) rotate_across<16>(window, first, mine);
}

SQ_INLINE void put_columns(float* window, int place, const float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) *(Run<4>*)(window + place_in_window(place) + i) = Run<4>{{v[i], v[i + 1], v[i + 2], v[i + 3]}};
}

SQ_INLINE void get_columns(const float* window, int place, float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        const Run<4> run = *(const Run<4>*)(window + place_in_window(place) + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] = run.value[j];
    }
}
