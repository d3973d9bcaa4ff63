// int4 codes of a weight, packed so that a thread's share of wgmma's A comes out of three operations a word.
//
// A byte holds the codes of two rows that lie 8 apart, in the same column; the first row's in the high half.
// A code in the high half of a byte is sixteen times itself as int8, sign and all: nothing is left to extend.
// 64 rows × 128 columns are 4096 bytes in a row: [columns 0-63, 64-127][128 threads][4 words].
#pragma once
#include "wgmma/layout.cuh"

// A step of 32 columns, two words: a[h + 2c] as in wgmma.cuh, times 16.
SQ_INLINE void expand_int4(uint32 first, uint32 second, uint32 (&a)[4]) {
    a[0] = first & 0xf0f0f0f0u;
    a[1] = (first << 4) & 0xf0f0f0f0u;
    a[2] = second & 0xf0f0f0f0u;
    a[3] = (second << 4) & 0xf0f0f0f0u;
}

// The sums are sixteen times too large, so the scales are made as much smaller. Powers of two change no rounding,
// as long as products of scales stay above 2^-122.
#define SQ_INT4_SCALE 0.0625f

// Where the way out puts things. y has a row for each token, the sums have one for each channel: boxes of tokens ×
// 64 channels, swizzled, 128 bytes a row. A block of stmatrix has 8 tokens × 8 channels.

// Of 16 tokens and a warp's 16 channels, the place of the row of a block that a lane names.
SQ_INLINE uint32 turned_row(int warp, int lane) { return swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2); }

// Of 16 tokens, a float; 32 channels are a box, the next 32 are in the one behind it, `tokens` rows on.
SQ_INLINE uint32 turned_float(int token, int channel, int tokens) {
    return channel / 32 * tokens * 128 + swizzled(token, channel % 32 / 4) + channel % 4 * 4;
}
