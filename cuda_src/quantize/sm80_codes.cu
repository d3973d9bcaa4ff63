// Activations to codes: smooth, find the scale of each row and segment, divide, round, pack. One read
// of the activations, one write of the codes.
//
// ACROSS threads hold a row in registers, CHUNKS vectors of 16 columns each, so that a scale that depends on
// the whole row costs no second read. The threads stay where they are and the rows come by: what belongs to a
// column (its segment, its smoothing factor, its static scale) is looked up once, and the next row is on its
// way while this one is rounded. DOWN rows share a block.
//
// Codes are stored in *packed columns*: each segment padded to a multiple of 32 columns, the row to a
// multiple of 64, with zeros.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16, 2 float32
//   FORMAT     0 int8, 1 int4 in a byte each, 2 int4 packed, 3 E4M3, 4 QuaRTZ as int8, 5 QuaRTZ packed
//   ROUNDED    QuaRTZ: to the nearest value instead of towards zero
//   DUAL       one step for x >= 0 and one for x < 0
//   DYNAMIC    scales are found here and written; otherwise they are read
//   SMOOTH     columns are multiplied with a vector first: 1 read each time, 2 kept in shared memory
//   ROTATE     columns are mixed then: 1 each block of columns inside a warp, 2 anywhere
//   SEGMENTED  more than one segment
//   ALIGNED    rows and segments of the input start at multiples of 16 bytes
//   WHOLE      1 segments have a multiple of 16 columns, 2 and each thread has columns
//   CHUNKS     vectors of 16 columns that a thread holds
//   ACROSS     threads of a row, a multiple of 32
//   DOWN       rows of a block at a time
//   RESIDENT   blocks that a multiprocessor shall have registers for
//   GROUP      columns that share a QuaRTZ shift, 16 or 32
// and what quantize/produce.cuh says, if the activations are made here as well.
#include "quantize/produce.cuh"
#include "quantize/rotation.cuh"
#include "quantize/rounding.cuh"

#define MIXED (SMOOTH || ROTATE)  // what is rounded is no longer what was read
#define AHEAD (CHUNKS * IN_BYTES <= 4)  // there are registers for a row that is on its way

#if SMOOTH
// The factors of sixteen columns, in an order in which the threads of a warp read side by side.
SQ_INLINE Words4* factors_of(Words4* kept, int chunk, int i) {
    return kept + (chunk * 4 + i) * THREADS + threadIdx.y * ACROSS + threadIdx.x;
}

SQ_INLINE void keep_factors(Words4* kept, const Columns (&at)[CHUNKS], const float* smooth) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)  // nothing is read for columns that do not exist
            *factors_of(kept, c, i) = at[c].count > 0 ? load_constant(smooth + at[c].place + 4 * i) : Words4{};
}
#endif

SQ_INLINE void to_values(float (&value)[16], const uint32 (&raw)[WORDS], const Columns& at, const float* smooth, Words4* kept, int chunk) {
#pragma unroll
    for (int i = 0; i < 16; ++i) value[i] = to_float(raw, i);
#if SMOOTH
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if SMOOTH == 2
        const Words4 factor = *factors_of(kept, chunk, i);
#else
        const Words4 factor = at.count > 0 ? load_constant(smooth + at.place + 4 * i) : Words4{};
#endif
#pragma unroll
        for (int j = 0; j < 4; ++j) value[4 * i + j] = __fmul_rn(value[4 * i + j], __uint_as_float(factor.word[j]));
    }
#endif
}

// Of values that were mixed, or that are floats anyway.
SQ_INLINE Extent extent_of(const float (&value)[16]) {
    int high = 0;  // as signed integers all negative floats are below, as unsigned ones all positive floats
    uint32 low = 0x80000000u;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const uint32 bits = __float_as_uint(value[i]);
        high = (int)bits > high ? (int)bits : high;
        low = bits > low ? bits : low;
    }
    return {(uint32)high, low};
}

#if INPUT != 2
SQ_INLINE uint32 larger(uint32 a, uint32 b) { return INPUT ? halfx2_max_or_nan(a, b) : bfloat16x2_max_or_nan(a, b); }
SQ_INLINE uint32 smaller(uint32 a, uint32 b) { return INPUT ? halfx2_min_or_nan(a, b) : bfloat16x2_min_or_nan(a, b); }

// Of values as they were read, two at a time.
SQ_INLINE Extent extent_of(const uint32 (&raw)[WORDS]) {
    uint32 most = 0, least = 0x80008000u;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        most = larger(most, raw[i]);
        least = smaller(least, raw[i]);
    }
    const uint32 a = __float_as_uint(to_float(&most, 0)), b = __float_as_uint(to_float(&most, 1));
    const uint32 c = __float_as_uint(to_float(&least, 0)), d = __float_as_uint(to_float(&least, 1));
    return {a > b ? a : b, c > d ? c : d};
}
#endif

#if ROTATE
#define ROTATION_ROOM (4 * WINDOW * (ROTATE == 1 ? DOWN * WARPS : DOWN * ((ACROSS * CHUNKS + 31) / 32)))  // bytes
SQ_INLINE void rotate(float (&held)[CHUNKS][16], const Columns (&at)[CHUNKS], float* windows) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) rotate_inside(held[c], at[c].block);
#if ROTATE == 1  // a window for each warp, used for one vector after the other
    float* window = windows + (threadIdx.y * WARPS + threadIdx.x / 32) * WINDOW;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int before = at[c].place / 512 * 512;  // of the columns of this warp
        put_columns(window, at[c].place - before, held[c]);
        __syncwarp();
        rotate_across(window, at[c].place - before, at[c].start - before, at[c].block);
        __syncwarp();
        get_columns(window, at[c].place - before, held[c]);
    }
#else  // one for the whole row
    float* window = windows + threadIdx.y * ((ACROSS * CHUNKS + 31) / 32) * WINDOW;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) put_columns(window, at[c].place, held[c]);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) rotate_across(window, at[c].place, at[c].start, at[c].block);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) get_columns(window, at[c].place, held[c]);
#endif
}
#else
#define ROTATION_ROOM 0
#endif

#if DYNAMIC
// The largest magnitudes of sixteen values: of all, or of those >= 0 and of those < 0. What is infinite does not count, nor NaN.
SQ_INLINE void magnitudes_in(uint32 (&found)[PATHS], const float (&value)[16], const Extent& extent, bool two) {
    uint32 above = extent.high, below = extent.low & 0x7fffffffu;
    if (!is_finite(extent)) {
        above = below = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32 magnitude = finite_magnitude(value[i]);
            if (value[i] < 0.f) below = magnitude > below ? magnitude : below;
            else above = magnitude > above ? magnitude : above;
        }
    }
    found[0] = !two && below > above ? below : above;
    if (DUAL) found[PATHS - 1] = two ? below : 0;
}

// Room for the largest magnitudes of the rows of a block. Rows take turns with the rooms: with two, a warp can
// write the next row's while another one still reads; a third is made ready meanwhile where atomics start from zero.
#define ROOMS (SEGMENTED ? 3 : 2)

// The largest magnitude of each term of a row, found by all of its threads: `most` for segments, else `own`.
SQ_INLINE const uint32* find_largest(
    const float (&held)[CHUNKS][16], const Extent (&extent)[CHUNKS], const Columns (&at)[CHUNKS], uint32* rooms, int terms, int turn, uint32 (&own)[PATHS]) {
    uint32 found[CHUNKS][PATHS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) magnitudes_in(found[c], held[c], extent[c], at[c].two);
    __syncwarp();  // lanes may come from different branches
#if SEGMENTED
    uint32* most = rooms + turn % 3 * terms;
#pragma unroll 1
    for (int i = threadIdx.x; i < terms; i += ACROSS) rooms[(turn + 1) % 3 * terms + i] = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
            // A maximum does not depend on the order: atomics keep it deterministic.
            if (at[c].alike) found[c][p] = warp_max(found[c][p]);
            if (!at[c].alike || threadIdx.x % 32 == 0) atomicMax(most + at[c].segment * PATHS + p, found[c][p]);
        }
    __syncthreads();
    return most;
#else
    uint32* most = rooms + turn % 2 * PATHS * WARPS;
#pragma unroll
    for (int p = 0; p < PATHS; ++p) {
        own[p] = found[0][p];
#pragma unroll
        for (int c = 1; c < CHUNKS; ++c) own[p] = found[c][p] > own[p] ? found[c][p] : own[p];
        own[p] = warp_max(own[p]);
        if (WARPS > 1 && threadIdx.x % 32 == 0) most[p * WARPS + threadIdx.x / 32] = own[p];
    }
    if (WARPS > 1) {
        __syncthreads();
#pragma unroll
        for (int p = 0; p < PATHS; ++p) own[p] = warp_max(threadIdx.x % 32 < WARPS ? most[p * WARPS + threadIdx.x % 32] : 0);
    }
    return own;
#endif
}

SQ_INLINE float found_scale(const uint32* most, int segment, int path, bool two) {
    return scale_for(__uint_as_float(most[segment * PATHS + (two ? path : 0)]), two && path);
}
#endif

SQ_INLINE void store(uint8* out, uint8* shifts, int64 to, const uint32 (&word)[4], int shift) {
#if FORMAT == 2 || FORMAT == 5
    struct alignas(8) Words2 { uint32 word[2]; } words = {{pack_halves(word[0], word[1]), pack_halves(word[2], word[3])}};
    *(Words2*)(out + to / 2) = words;
    if (FORMAT == 5 && to % GROUP == 0) shifts[to / GROUP] = (uint8)shift;
#else
    *(Words4*)(out + to) = Words4{{word[0], word[1], word[2], word[3]}};
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) codes(
    const uint8* __restrict__ x,       // (rows, columns), row_bytes apart
    int64 row_bytes,
    int rows,
    const int* __restrict__ packed,    // (segments,) first packed column of each
    const int* __restrict__ source,    // (segments + 1,) its first column in x; last: columns of x
    int segments,
    int width,                         // packed columns
    const float* __restrict__ smooth,  // (width,) to multiply with
    const int* __restrict__ duals,     // (segments,) 1 where a sign has its own step; or null: everywhere
    const int* __restrict__ blocks,    // (segments,) columns that are mixed, a power of two
    float* __restrict__ scale,         // (segments * PATHS, scale_rows)
    int scale_rows,                    // rows, or 1
    uint8* __restrict__ out,           // (rows, width) bytes, or half of them
    uint8* __restrict__ shifts         // (rows, width / GROUP), packed QuaRTZ only
#if NORM
    , const uint8* __restrict__ weight,  // (columns,) of the norm, in the type of x
    const uint8* __restrict__ bias,      // (columns,)
    const uint8* __restrict__ factors,   // (images, columns), factors_bytes apart: without the 1
    const uint8* __restrict__ summands,  // (images, columns), summands_bytes apart
    int64 factors_bytes,
    int64 summands_bytes,
    int rows_of_image,
    float eps
#if KEEP
    , uint8* __restrict__ made           // (rows, columns) what the norm makes, in the type of x
#endif
#elif PRODUCER
    , int64 gate  // bytes from a value to its gate
#endif
) {
    SQ_SHARED(shared);
    Words4* kept = (Words4*)shared;  // smoothing factors
    Columns at[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
        at[c] = columns_at((c * ACROSS + threadIdx.x) * 16, packed, source, segments, width, duals, blocks);
#if SMOOTH == 2
    keep_factors(kept, at, smooth);
#endif
#if NORM || ROTATE || DYNAMIC
    uint8* after = shared + (SMOOTH == 2 ? THREADS * CHUNKS * 64 : 0);
#endif
#if NORM
    Words4* vectors = (Words4*)after;
    after += KEPT_BYTES;
    float* sums = (float*)after + threadIdx.y * SUMS;
    after += (DOWN * SUMS * 4 + 15) / 16 * 16;
    keep_affine(vectors, at, weight, bias);
    int image = -1;
#endif
#if DYNAMIC
    const int terms = segments * PATHS;
    uint32* rooms = (uint32*)(after + ROTATION_ROOM) + threadIdx.y * ROOMS * (SEGMENTED ? terms : WARPS * PATHS);
#if SEGMENTED
    for (int i = threadIdx.x; i < terms; i += ACROSS) rooms[i] = 0;
    __syncthreads();
#endif
#endif

    uint32 raw[CHUNKS][WORDS];
    int first = blockIdx.x * DOWN, turn = 0;
    if (AHEAD) fetch(raw, at, x, row_bytes, first + threadIdx.y, rows, 0);
#if PRODUCER == 3 && GATED
    uint32 gates[CHUNKS][WORDS];
    if (AHEAD) fetch(gates, at, x + gate, row_bytes, first + threadIdx.y, rows, 0);
#endif
    for (; first < rows; first += gridDim.x * DOWN, ++turn) {  // all threads of a block go round equally often
        const int row = first + threadIdx.y;
        const bool live = row < rows;
        if (!AHEAD) fetch(raw, at, x, row_bytes, row, rows, 0);
#if PRODUCER == 3 && GATED
        if (!AHEAD) fetch(gates, at, x + gate, row_bytes, row, rows, 0);
#endif
#if NORM
        if ((SCALED || SHIFTED) && live && image != row / rows_of_image) {
            image = row / rows_of_image;
            keep_modulation(vectors, at, factors, summands, factors_bytes, summands_bytes, image);
        }
        normalize(raw, at, vectors, sums + turn % 2 * 2 * GROUPS, source[segments], eps);
#if KEEP
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
            if (live) store16(made + ((int64)row * source[segments] + at[c].source) * IN_BYTES, raw[c], at[c].count);
#endif
#if KEEP == 2
        if (AHEAD) fetch(raw, at, x, row_bytes, row + gridDim.x * DOWN, rows, live ? row : 0);
        continue;
#endif
#elif PRODUCER
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#if GATED
            activate(gates[c]);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) raw[c][i] = product_of(raw[c][i], gates[c][i]);
#else
            activate(raw[c]);
#endif
        }
#endif
        // The registers of what was read are free for the next row before that is waited for.
        float held[CHUNKS][16];
        Extent extent[CHUNKS];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            to_values(held[c], raw[c], at[c], smooth, kept, c);
#if INPUT != 2 && !MIXED
            extent[c] = extent_of(raw[c]);
#endif
            settle(held[c]);
        }
        if (AHEAD) fetch(raw, at, x, row_bytes, row + gridDim.x * DOWN, rows, live ? row : 0);
#if PRODUCER == 3 && GATED
        if (AHEAD) fetch(gates, at, x + gate, row_bytes, row + gridDim.x * DOWN, rows, live ? row : 0);
#endif
#if ROTATE
        rotate(held, at, (float*)after);
#endif
#if INPUT == 2 || MIXED
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) extent[c] = extent_of(held[c]);
#endif
#if DYNAMIC
        uint32 own[PATHS];
        const uint32* most = find_largest(held, extent, at, rooms, terms, turn, own);
        if (live && threadIdx.x == 0 && !SEGMENTED)
#pragma unroll
            for (int p = 0; p < PATHS; ++p) scale[(int64)p * scale_rows + row] = found_scale(most, 0, p, at[0].two);
        if (live && SEGMENTED)
#pragma unroll 1
            for (int i = threadIdx.x; i < terms; i += ACROSS)
                scale[(int64)i * scale_rows + row] = found_scale(most, i / PATHS, i % PATHS, two_steps(duals, i / PATHS));
#endif

        // Divide, round, pack, write.
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            float scales[PATHS];
#pragma unroll
            for (int p = 0; p < PATHS; ++p)
#if DYNAMIC
                scales[p] = found_scale(most, at[c].segment, p, at[c].two);
#else
                scales[p] = scale[(int64)(at[c].segment * PATHS + (at[c].two ? p : 0)) * scale_rows + (scale_rows > 1 && live ? row : 0)];
#endif
            divide(held[c], steps_of(scales), extent[c]);
            uint32 word[4];
            int shift = 0;
#if FORMAT == 3
            round_to_e4m3(word, held[c]);
#else
            round_to_bytes(word, held[c]);
#endif
#if QUARTZ
            shift = shift_of(word);
            drop_bits(word, held[c], shift);
#endif
            if (live && at[c].place < width) store(out, shifts, (int64)row * width + at[c].place, word, shift);
        }
    }
}
