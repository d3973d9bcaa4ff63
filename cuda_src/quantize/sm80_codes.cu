// Activations to codes: smooth, find the scale of each row and segment, divide, round, pack. One read
// of the activations, one write of the codes.
//
// ACROSS threads hold a row in registers, CHUNKS vectors of 16 columns each, so that a scale that depends on
// the whole row costs no second read. The threads stay where they are and the rows come by: what belongs to a
// column (its place, its segment) is looked up once, and the next row is on its way to shared memory while this one
// is rounded. What is done once for a row (scales, and the meeting of the threads where a row has more than a warp)
// is shared by all vectors of a thread, so most rows get few threads with many vectors. DOWN rows share a block.
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
//   SMOOTH     columns are multiplied with a vector first
//   ROTATE     columns are mixed then: 1 each block of columns inside a warp, 2 anywhere
//   BLOCK      how many columns are mixed in all segments; 0: as a table says
//   SEGMENTED  more than one segment: 2 without padding, so that packed columns are those of the input
//   ALIGNED    rows and segments of the input start at multiples of 16 bytes
//   STAGED     the next row is sent to shared memory; for ALIGNED ones
//   WHOLE      1 segments have a multiple of 16 columns, 2 and each thread has columns
//   CHUNKS     vectors of 16 columns that a thread holds
//   ACROSS     threads of a row: 8, 16 or a multiple of 32
//   DOWN       rows of a block at a time
//   RESIDENT   blocks that a multiprocessor shall have registers for
//   GROUP      columns that share a QuaRTZ shift, 16 or 32
// and what quantize/produce.cuh says, if the activations are made here as well.
#include "quantize/produce.cuh"
#include "quantize/rotation.cuh"
#include "quantize/rounding.cuh"

#define MIXED (SMOOTH || ROTATE)  // what is rounded is no longer what was read

// The smoothing factors of sixteen columns, for all rows of a block, in an order in which the threads of a warp read side by side.
SQ_INLINE Words4* factors_of(Words4* kept, int chunk, int i) { return kept + (chunk * 4 + i) * ACROSS + threadIdx.x; }

// Floats, smoothed, of sixteen values.
SQ_INLINE void to_values(float (&value)[16], const uint32 (&raw)[WORDS], Words4* kept, int chunk) {
    to_floats(value, raw);
#if SMOOTH
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Words4 factor = *factors_of(kept, chunk, i);
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

#define EXTENTS (SEGMENTED ? CHUNKS : 1)  // each vector of a thread may belong to another segment

SQ_INLINE Extent both(const Extent& a, const Extent& b) { return {a.high > b.high ? a.high : b.high, a.low > b.low ? a.low : b.low}; }

#if INPUT == 2
SQ_INLINE Extent extent_of(const uint32 (&raw)[WORDS]) {
    float value[16];
    to_floats(value, raw);
    return extent_of(value);
}
#else
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

// Where the values of a row are, sixteen at a time: where they were sent, in registers as they were made, or as floats.
struct Read {
    uint8* stage;
    const uint8* from;
    const Columns (&at)[CHUNKS];
    SQ_MEMBER void get(uint32 (&words)[WORDS], int c) const { take(words, stage, c, at, from); }
    SQ_MEMBER void get(float (&value)[16], int c) const {
        uint32 words[WORDS];
        get(words, c);
        to_floats(value, words);
    }
    SQ_MEMBER Extent extent(int c) const {
        uint32 words[WORDS];
        get(words, c);
        return extent_of(words);
    }
};

struct Made {
    const uint32 (&raw)[CHUNKS][WORDS];
    SQ_MEMBER void get(uint32 (&words)[WORDS], int c) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = raw[c][i];
    }
    SQ_MEMBER void get(float (&value)[16], int c) const { to_floats(value, raw[c]); }
    SQ_MEMBER Extent extent(int c) const { return extent_of(raw[c]); }
};

struct Held {
    const float (&held)[CHUNKS][16];
    SQ_MEMBER void get(float (&value)[16], int c) const {
#pragma unroll
        for (int i = 0; i < 16; ++i) value[i] = held[c][i];
    }
    SQ_MEMBER Extent extent(int c) const { return extent_of(held[c]); }
};

#if ROTATE
#define ROTATION_ROOM (4 * WINDOW * (ROTATE == 1 ? THREADS / 32 : DOWN * ((ACROSS * CHUNKS + 31) / 32)))  // bytes
SQ_INLINE void rotate(float (&held)[CHUNKS][16], const Columns (&at)[CHUNKS], float* windows) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) rotate_inside(held[c], at[c].block);
#if ROTATE == 1  // a window for each warp, used for one vector after the other
    const int thread = threadIdx.y * ACROSS + threadIdx.x, here = thread % 32 * 16;
    float* window = windows + thread / 32 * WINDOW;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        put_columns(window, here, held[c]);
        __syncwarp();
        rotate_across(window, here, at[c].start - at[c].place + here, at[c].block);
        __syncwarp();
        get_columns(window, here, held[c]);
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
// Of those values that are finite.
SQ_INLINE Extent finite_extent_of(const float (&values)[16]) {
    Extent found = {0, 0x80000000u};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float value = values[i];
        const uint32 magnitude = finite_magnitude(value);
        if (value < 0.f) found.low = (magnitude | 0x80000000u) > found.low ? magnitude | 0x80000000u : found.low;
        else found.high = magnitude > found.high ? magnitude : found.high;
    }
    return found;
}

// The largest magnitudes: of all values, or of those >= 0 and of those < 0.
SQ_INLINE void magnitudes_in(uint32 (&found)[PATHS], const Extent& extent, bool two) {
    const uint32 above = extent.high, below = extent.low & 0x7fffffffu;
    found[0] = !two && below > above ? below : above;
    if (DUAL) found[PATHS - 1] = two ? below : 0;
}

// Room for the largest magnitudes of the rows of a block. Rows take turns with the rooms: with two, a warp can
// write the next row's while another one still reads; a third is made ready meanwhile where atomics start from zero.
#define ROOMS (SEGMENTED ? 3 : 2)

// The largest magnitude of each term of a row, found by all of its threads: what is returned for segments, else `own`.
// What is infinite does not count, nor NaN.
template <class Values> SQ_INLINE const uint32* find_largest(
    const Values& values, const Extent (&extent)[EXTENTS], const Columns (&at)[CHUNKS], uint32* rooms, int terms, int turn, uint32 (&own)[PATHS]) {
#if SEGMENTED
    uint32* most = rooms + turn % 3 * terms;
#pragma unroll 1
    for (int i = threadIdx.x; i < terms; i += ACROSS) rooms[(turn + 1) % 3 * terms + i] = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        uint32 found[PATHS];
        Extent here = extent[c];
        if (!is_finite(here)) {
            float value[16];
            values.get(value, c);
            here = finite_extent_of(value);
        }
        magnitudes_in(found, here, at[c].two);
        __syncwarp();  // lanes may come from different branches
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
            // NOTE: always, and not only if the warp is alike: NVRTC 13.0 gave such a reduction the condition of a load, for
            // segments that end inside of a vector, and their last columns did not count.
            const uint32 all = warp_max(found[p]);
            if (at[c].alike) found[p] = all;
        }
        // A maximum does not depend on the order: atomics keep it deterministic.
        if (!at[c].alike || threadIdx.x % 32 == 0)
#pragma unroll
            for (int p = 0; p < PATHS; ++p) atomicMax(most + at[c].segment * PATHS + p, found[p]);
    }
    __syncthreads();
    return most;
#else
    Extent whole = extent[0];
    if (!is_finite(whole)) {
        whole = {0, 0x80000000u};
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            float value[16];
            values.get(value, c);
            whole = both(whole, finite_extent_of(value));
        }
    }
    __syncwarp();  // lanes may come from different branches
    magnitudes_in(own, whole, at[0].two);
#if ACROSS < 32
#pragma unroll
    for (int p = 0; p < PATHS; ++p)
#pragma unroll
        for (int n = ACROSS / 2; n; n /= 2) {
            const uint32 other = __shfl_xor_sync(0xffffffffu, own[p], n);
            own[p] = own[p] > other ? own[p] : other;
        }
#else
    uint32* most = rooms + turn % 2 * PATHS * WARPS;
#pragma unroll
    for (int p = 0; p < PATHS; ++p) own[p] = warp_max(own[p]);
    if (WARPS > 1 && threadIdx.x % 32 == 0)
#pragma unroll
        for (int p = 0; p < PATHS; ++p) most[p * WARPS + threadIdx.x / 32] = own[p];
    if (WARPS > 1) {
        __syncthreads();
#pragma unroll
        for (int p = 0; p < PATHS; ++p) own[p] = warp_max(threadIdx.x % 32 < WARPS ? most[p * WARPS + threadIdx.x % 32] : 0);
    }
#endif
    return own;
#endif
}

SQ_INLINE float found_magnitude(const uint32* most, int segment, int path, bool two) {
    return __uint_as_float(most[segment * PATHS + (two ? path : 0)]);
}

SQ_INLINE float found_scale(const uint32* most, int segment, int path, bool two) {
    return scale_for(found_magnitude(most, segment, path, two), two && path);
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
    int columns,                       // of x
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
    const uint8* __restrict__ multipliers,  // (images, columns), factors_bytes apart: without the 1
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
    Columns at[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
        at[c] = columns_at((c * ACROSS + threadIdx.x) * 16, packed, source, segments, columns, width, duals, blocks);
#if MIXED || NORM || DYNAMIC
    uint8* after = shared + (STAGED ? 2 * TENSORS * STAGE_BYTES : 0);
#endif
#if MIXED
    Words4* factors = (Words4*)after;
#endif
#if SMOOTH
    after += CHUNKS * ACROSS * 64;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)  // nothing is read for columns that do not exist
            if (!threadIdx.y) *factors_of(factors, c, i) = at[c].count > 0 ? load_constant(smooth + at[c].place + 4 * i) : Words4{};
#endif
#if NORM
    float* sums = (float*)after + threadIdx.y * SUMS;
    after += (DOWN * SUMS * 4 + 15) / 16 * 16;
#endif
    if (DOWN > 1 && SMOOTH) __syncthreads();
#if DYNAMIC
    const int terms = segments * PATHS;
    uint32* rooms = (uint32*)(after + ROTATION_ROOM) + threadIdx.y * ROOMS * (SEGMENTED ? terms : WARPS * PATHS);
#if SEGMENTED
    for (int i = threadIdx.x; i < terms; i += ACROSS) rooms[i] = 0;
    __syncthreads();
#endif
#endif

    int first = blockIdx.x * DOWN, turn = 0;
    const uint8* from = x + (first + threadIdx.y < rows ? first + threadIdx.y : 0) * row_bytes;
    const int step = gridDim.x * DOWN;
#if STAGED
    send(shared, at, from);
#if GATES
    send(shared + STAGE_BYTES, at, from + gate);
#endif
    copies_commit();
#endif
    for (; first < rows; first += step, ++turn) {  // all threads of a block go round equally often
        const int row = first + threadIdx.y;
        const bool live = row < rows;
        const uint8* here = from;
        uint8* stage = shared + (STAGED ? turn % 2 * TENSORS * STAGE_BYTES : 0);
        if (row + step < rows) from += step * row_bytes;  // behind the last row: this one, or the first
#if STAGED
        __syncwarp();  // all lanes have read what is overwritten now
        if (first + step < rows) {
            uint8* other = shared + (turn + 1) % 2 * TENSORS * STAGE_BYTES;
            send(other, at, from);
#if GATES
            send(other + STAGE_BYTES, at, from + gate);
#endif
        }
        copies_commit();
        copies_wait<1>();
        __syncwarp();
#endif
#if PRODUCER
        uint32 raw[CHUNKS][WORDS];  // what is made
#endif
#if NORM
        const int image = (SCALED || SHIFTED) && live ? row / rows_of_image : 0;
        const Vectors vectors = {weight, bias, multipliers + image * factors_bytes, summands + image * summands_bytes};
        normalize(raw, stage, here, at, vectors, sums + turn % 2 * 2 * GROUPS, columns, eps);
#if KEEP
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
            if (live) store16(made + ((int64)row * columns + at[c].source) * IN_BYTES, raw[c], at[c].count);
#endif
#if KEEP == 2
        continue;
#endif
#elif PRODUCER
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            take(raw[c], stage, c, at, here);
#if GATES
            uint32 gates[WORDS];
            take(gates, stage + STAGE_BYTES, c, at, here + gate);
            activate(gates);
            multiply(raw[c], gates);
#else
            activate(raw[c]);
#endif
        }
#endif
#if PRODUCER
        const Made read = {raw};
#else
        const Read read = {stage, here, at};
#endif
#if MIXED
        float held[CHUNKS][16];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            uint32 words[WORDS];
            read.get(words, c);
            to_values(held[c], words, factors, c);
        }
#if ROTATE
        rotate(held, at, (float*)after);
#endif
        const Held values = {held};
#else
        const auto& values = read;
#endif
        Extent extent[EXTENTS];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const Extent found = values.extent(c);
            extent[c % EXTENTS] = c < EXTENTS ? found : both(extent[0], found);
        }
#if DYNAMIC
        uint32 own[PATHS];
        const uint32* most = find_largest(values, extent, at, rooms, terms, turn, own);
        if (live && threadIdx.x == 0 && !SEGMENTED)
#pragma unroll
            for (int p = 0; p < PATHS; ++p) scale[(int64)p * scale_rows + row] = found_scale(most, 0, p, at[0].two);
        if (live && SEGMENTED)
#pragma unroll 1
            for (int i = threadIdx.x; i < terms; i += ACROSS)
                scale[(int64)i * scale_rows + row] = found_scale(most, i / PATHS, i % PATHS, two_steps(duals, i / PATHS));
#endif

        // Divide, round, pack, write.
        Steps steps;
        Allowed allowed;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (!c || (SEGMENTED && at[c].segment != at[c ? c - 1 : 0].segment)) {
                float scales[PATHS];
#pragma unroll
                for (int p = 0; p < PATHS; ++p)
#if DYNAMIC
                    scales[p] = found_scale(most, at[c].segment, p, at[c].two);
#else
                    scales[p] = scale[(int64)(at[c].segment * PATHS + (at[c].two ? p : 0)) * scale_rows + (scale_rows > 1 && live ? row : 0)];
#endif
                steps = steps_of(scales);
#if FEW_BITS
                steps.quick = true;
#pragma unroll
                for (int p = 0; p < PATHS; ++p)
                    steps.quick = steps.quick && is_quick(found_magnitude(most, at[c].segment, p, at[c].two), scales[p], steps.inverse[p], at[c].two && p);
#endif
            }
            if (c < EXTENTS) allowed = allowed_by(steps, extent[c]);
            float value[16];
            values.get(value, c);
            divide(value, steps, allowed);
            uint32 word[4];
            int shift = 0;
#if FORMAT == 3
            round_to_e4m3(word, value);
#else
            round_to_bytes(word, value);
#endif
#if QUARTZ
            shift = shift_of(word);
            drop_bits(word, value, shift);
#endif
            if (live && at[c].place < width) store(out, shifts, (int64)row * width + at[c].place, word, shift);
        }
    }
}
