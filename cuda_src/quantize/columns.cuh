// Sixteen columns of a row: where a thread finds them, and how it reads them.
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define THREADS (ACROSS * DOWN)
#define WARPS (ACROSS / 32)
#define IN_BYTES (INPUT == 2 ? 4 : 2)
#define WORDS (4 * IN_BYTES)  // of 16 values

SQ_INLINE float to_float(const uint32* raw, int i) {
#if INPUT == 2
    return __uint_as_float(raw[i]);
#elif INPUT == 1
    return half_to_float((uint16)(raw[i / 2] >> (i % 2 * 16)));
#else
    return i % 2 ? __uint_as_float(raw[i / 2] & 0xffff0000u) : __uint_as_float(raw[i / 2] << 16);
#endif
}

// Computed here, and not only where it is used: so that the registers that it was made of are free from here on.
SQ_INLINE void settle(float (&value)[16]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(value[i]));
#endif
}

// Sixteen values from `from` on, of which the first `count` exist; the others are zero.
SQ_INLINE void load16(uint32 (&raw)[WORDS], const uint8* from, int count) {
#if WHOLE == 2  // no condition: a choice between what is loaded and zero would wait for the load
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i) {
        const Words4 v = load_constant(from + 16 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) raw[4 * i + j] = v.word[j];
    }
#else
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = 0;
#if ALIGNED
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i) load_constant_if(WHOLE ? count > 0 : count >= 16, raw + 4 * i, from + 16 * i);
#endif
#if !ALIGNED || !WHOLE
    if (ALIGNED && count >= 16) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i >= count) continue;
#if INPUT == 2
        raw[i] = ((const uint32*)from)[i];
#else
        raw[i / 2] |= (uint32)((const uint16*)from)[i] << (i % 2 * 16);
#endif
    }
#endif
#endif
}

struct Columns {
    int place, segment;  // first packed column
    int source, count;   // first column of x, and how many from there on belong to the segment
    int start, block;    // packed start of the segment, and how many columns are mixed; 1: none
    bool two;            // the sign selects the step
    bool alike;          // the whole warp is in this segment
};

SQ_INLINE int segment_at(const int* starts, int segments, int place) {
    int segment = 0;
    while (segment + 1 < segments && place >= starts[segment + 1]) ++segment;
    return segment;
}

// Does the sign of a value select its step in this segment?
SQ_INLINE bool two_steps(const int* duals, int segment) { return DUAL && (!duals || duals[segment]); }

SQ_INLINE Columns columns_at(int place, const int* packed, const int* source, int segments, int width, const int* duals, const int* blocks) {
    Columns c;
    c.place = place;
#if SEGMENTED
    c.segment = segment_at(packed, segments, place);
    c.start = packed[c.segment];
    c.source = source[c.segment] + place - c.start;
    c.alike = c.segment == segment_at(packed, segments, place / 512 * 512);
    c.alike = __all_sync(0xffffffffu, c.alike);
#else
    c.segment = c.start = 0;
    c.source = place;
    c.alike = true;
#endif
    c.count = place < width ? source[c.segment + 1] - c.source : 0;
    c.two = two_steps(duals, c.segment);
    c.block = ROTATE && c.count > 0 ? blocks[c.segment] : 1;
    return c;
}

// Everything of a row that this thread holds is on its way before anything is used. Behind the last row another
// one takes its place, which is at hand.
SQ_INLINE void fetch(uint32 (&raw)[CHUNKS][WORDS], const Columns (&at)[CHUNKS], const uint8* x, int64 row_bytes, int row, int rows, int instead) {
    const uint8* from = x + (row < rows ? row : instead) * row_bytes;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) load16(raw[c], from + (int64)at[c].source * IN_BYTES, at[c].count);
}
