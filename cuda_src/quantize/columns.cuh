// Sixteen columns of a row: where a thread finds them, and how it reads them.
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define THREADS (ACROSS * DOWN)
#define WARPS ((ACROSS + 31) / 32)  // of a row; a warp may have several rows
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

SQ_INLINE Columns columns_at(int place, const int* packed, const int* source, int segments, int columns, int width, const int* duals, const int* blocks) {
    Columns c;
    c.place = place;
#if SEGMENTED
    c.segment = segment_at(packed, segments, place);
    c.start = packed[c.segment];
    c.source = SEGMENTED == 2 ? place : source[c.segment] + place - c.start;
    c.alike = c.segment == segment_at(packed, segments, place / 512 * 512);
    c.alike = __all_sync(0xffffffffu, c.alike);
#else
    c.segment = c.start = 0;
    c.source = place;
    c.alike = true;
#endif
    c.count = place >= width ? 0 : (SEGMENTED ? source[c.segment + 1] : columns) - c.source;
    c.two = two_steps(duals, c.segment);
    c.block = BLOCK ? BLOCK : ROTATE && c.count > 0 ? blocks[c.segment] : 1;
    return c;
}

// The next row is on its way to shared memory, which costs no registers, while this one is worked on: rows take
// turns with two places. Rows that are not aligned, or too long, are read where they are, and again for their codes.
#define STAGE_BYTES (CHUNKS * THREADS * 16 * IN_BYTES)  // of a row for each place in the block

// A warp copies what its lanes will read, side by side; elsewhere a lane copies what it reads itself.
#define TOGETHER (WHOLE == 2 && ACROSS % 32 == 0 && SEGMENTED != 1)

// Place of a piece of 16 bytes. Lanes that read or write at the same time shall meet different banks.
SQ_INLINE uint8* staged(uint8* stage, int c, int i) {
    const int thread = threadIdx.y * ACROSS + threadIdx.x;
#if TOGETHER
    const int piece = thread % 32 * IN_BYTES + i;
    return stage + ((c * THREADS + thread / 32 * 32) * IN_BYTES + (piece ^ piece / 8 % IN_BYTES)) * 16;
#else
    return stage + ((c * IN_BYTES + i) * THREADS + thread) * 16;
#endif
}

SQ_INLINE void send(uint8* stage, const Columns (&at)[CHUNKS], const uint8* from) {
#if TOGETHER
    const int thread = threadIdx.y * ACROSS + threadIdx.x, lane = thread % 32;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < IN_BYTES; ++i) {
            const int piece = i * 32 + lane;
            copy16_async(stage + ((c * THREADS + thread / 32 * 32) * IN_BYTES + (piece ^ piece / 8 % IN_BYTES)) * 16,
                         from + (int64)(c * ACROSS + threadIdx.x / 32 * 32) * 16 * IN_BYTES + piece * 16, 16);
        }
#else
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < IN_BYTES; ++i) {
            const int there = WHOLE ? (WHOLE == 2 || at[c].count > 0) * 16 : at[c].count * IN_BYTES - 16 * i;
            copy16_async_near(staged(stage, c, i), from + (int64)at[c].source * IN_BYTES + 16 * i, WHOLE ? there : there < 0 ? 0 : there > 16 ? 16 : there);
        }
#endif
}

// Sixteen values of this row.
SQ_INLINE void take(uint32 (&to)[WORDS], uint8* stage, int c, const Columns (&at)[CHUNKS], const uint8* from) {
#if STAGED
#pragma unroll
    for (int i = 0; i < IN_BYTES; ++i) {
        const Words4 v = *(const Words4*)staged(stage, c, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[4 * i + j] = v.word[j];
    }
#else
    load16(to, from + (int64)at[c].source * IN_BYTES, at[c].count);
#endif
}
