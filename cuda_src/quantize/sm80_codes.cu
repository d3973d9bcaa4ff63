// Activations to codes: smooth, find the scale of each row and segment, divide, round, pack. One read
// of the activations, one write of the codes.
//
// blockDim.x threads hold a row in registers, CHUNKS vectors of 16 columns each, so that a scale that
// depends on the whole row costs no second read. blockDim.y rows share a block.
//
// Codes are stored in *packed columns*: each segment padded to a multiple of 32 columns, the row to a
// multiple of 64, with zeros.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16, 2 float32
//   FORMAT     0 int8, 1 int4 in a byte each, 2 int4 packed, 3 E4M3, 4 QuaRTZ as int8, 5 QuaRTZ packed
//   DUAL       one step for x >= 0 and one for x < 0
//   DYNAMIC    scales are found here and written; otherwise they are read
//   SMOOTH     columns are multiplied with a vector first
//   SEGMENTED  more than one segment
//   ALIGNED    rows and segments of the input start at multiples of 16 bytes
//   CHUNKS     vectors of 16 columns that a thread holds
//   THREADS    of a block
//   GROUP      columns that share a QuaRTZ shift, 16 or 32
#include "common/int4.cuh"
#include "common/memory.cuh"
#include "common/numbers.cuh"

#define QUARTZ (FORMAT >= 4)
#define PATHS (DUAL ? 2 : 1)
#define IN_BYTES (INPUT == 2 ? 4 : 2)
#define WORDS (4 * IN_BYTES)  // of 16 values
// Few registers for many blocks at a time, which hide each other's waiting; but not fewer than the row takes.
#define RESIDENT (CHUNKS * IN_BYTES <= 4 && THREADS <= 1024 ? 1024 / THREADS : 1)
#if FORMAT == 1 || FORMAT == 2
#define HIGHEST 7.f
#define LOWEST -8.f
#elif FORMAT == 3
#define HIGHEST 448.f
#define LOWEST -448.f
#else
#define HIGHEST 127.f
#define LOWEST (QUARTZ ? -127.f : -128.f)
#endif

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
#if ALIGNED
    if (count >= 16) {
#pragma unroll
        for (int i = 0; i < IN_BYTES; ++i) {
            Words4 v = load_constant(from + 16 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) raw[4 * i + j] = v.word[j];
        }
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw[i] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i >= count) continue;
#if INPUT == 2
        raw[i] = ((const uint32*)from)[i];
#else
        raw[i / 2] |= (uint32)((const uint16*)from)[i] << (i % 2 * 16);
#endif
    }
}

// Sixteen values, smoothed; nothing is read for columns that do not exist.
SQ_INLINE void to_values(float (&value)[16], const uint32* raw, const float* smooth, int count) {
#if SMOOTH
    Words4 factor[4] = {};
    if (count > 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) factor[i] = load_constant(smooth + 4 * i);
    }
#endif
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        value[i] = to_float(raw, i);
#if SMOOTH
        value[i] = __fmul_rn(value[i], __uint_as_float(factor[i / 4].word[i % 4]));
#endif
    }
}

// Where the largest and the smallest of sixteen values lie, zero between them: no NaN counts.
struct Range { float low, high; };

SQ_INLINE Range range_of(const uint32 (&raw)[WORDS], const float (&value)[16]) {
    Range r = {0.f, 0.f};
#if INPUT == 2 || SMOOTH
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        r.low = fminf(r.low, value[i]);
        r.high = fmaxf(r.high, value[i]);
    }
#else  // two at a time
    uint32 low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        low = INPUT ? halfx2_min(low, raw[i]) : bfloat16x2_min(low, raw[i]);
        high = INPUT ? halfx2_max(high, raw[i]) : bfloat16x2_max(high, raw[i]);
    }
    r.low = fminf(to_float(&low, 0), to_float(&low, 1));
    r.high = fmaxf(to_float(&high, 0), to_float(&high, 1));
#endif
    if (r.high - r.low < __uint_as_float(0x7f800000u)) return r;
    // Something is infinite, which does not count either; or only the difference overflows.
    uint32 below = 0, above = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        uint32 magnitude = finite_magnitude(value[i]);
        if (value[i] < 0.f) below = magnitude > below ? magnitude : below;
        else above = magnitude > above ? magnitude : above;
    }
    r.low = -__uint_as_float(below);
    r.high = __uint_as_float(above);
    return r;
}

// Four codes, one in the low byte of each word, to one word.
SQ_INLINE uint32 pack_bytes(uint32 a, uint32 b, uint32 c, uint32 d) {
    return pick_bytes(pick_bytes(a, b, 0x0040), pick_bytes(c, d, 0x0040), 0x5410);
}

// Eight codes, one in the low half-byte of each word, to one word.
SQ_INLINE uint32 pack_halves(const uint32* code) {
    uint32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) word |= (code[i] & 0xfu) << (4 * i);
    return word;
}

// Sixteen columns: where they come from and what they share.
struct Columns {
    int place, segment;          // first packed column
    int source, count;           // first column of x, and how many from there on belong to the segment
    bool two;                    // the sign selects the step
    bool alike;                  // the whole warp is in this segment
};

SQ_INLINE int segment_at(const int* starts, int segments, int place) {
    int segment = 0;
    while (segment + 1 < segments && place >= starts[segment + 1]) ++segment;
    return segment;
}

// Does the sign of a value select its step in this segment?
SQ_INLINE bool two_steps(const int* duals, int segment) { return DUAL && (!duals || duals[segment]); }

SQ_INLINE Columns columns_at(int place, const int* packed, const int* source, int segments, int width, const int* duals) {
    Columns c;
    c.place = place;
#if SEGMENTED
    c.segment = segment_at(packed, segments, place);
    c.source = source[c.segment] + place - packed[c.segment];
    c.alike = c.segment == segment_at(packed, segments, place / 512 * 512);
    c.alike = __all_sync(0xffffffffu, c.alike);
#else
    c.segment = 0;
    c.source = place;
    c.alike = true;
#endif
    c.count = place < width ? source[c.segment + 1] - c.source : 0;
    c.two = two_steps(duals, c.segment);
    return c;
}

// What a magnitude is divided by to become a scale.
SQ_INLINE float code_range(bool below) { return below ? -LOWEST : HIGHEST; }

SQ_INLINE float magnitude_of(const uint32* most, int segment, int path, bool two) {
    return __uint_as_float(two ? most[segment * PATHS + path] : most[segment * PATHS]);
}
SQ_INLINE float exact_scale(const uint32* most, int segment, int path, bool two) {
    return usable_scale(__fdiv_rn(magnitude_of(most, segment, path, two), code_range(two && path)));
}

#if DYNAMIC
// The largest magnitude of each term of a row, found by all of its threads; `most` is room that they share,
// and `own` room that a thread has for itself.
SQ_INLINE const uint32* find_largest(
    const uint32 (&raw)[CHUNKS][WORDS], const Columns (&at)[CHUNKS], const float* smooth, uint32* most, uint32 (&own)[PATHS], int segments) {
#if SEGMENTED
    for (int i = threadIdx.x; i < segments * PATHS; i += blockDim.x) most[i] = 0;
    __syncthreads();
#else
    uint32 largest[PATHS] = {};
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        float value[16];
        to_values(value, raw[c], smooth + at[c].place, at[c].count);
        const Range range = range_of(raw[c], value);
        uint32 found[2] = {__float_as_uint(range.high) & 0x7fffffffu, __float_as_uint(range.low) & 0x7fffffffu};
        if (!at[c].two) {
            found[0] = found[1] > found[0] ? found[1] : found[0];
            found[1] = 0;
        }
        __syncwarp();  // lanes may come from different branches
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
#if SEGMENTED
            // A maximum does not depend on the order: atomics keep it deterministic.
            if (at[c].alike) found[p] = warp_max(found[p]);
            if (!at[c].alike || threadIdx.x % 32 == 0) atomicMax(most + at[c].segment * PATHS + p, found[p]);
#else
            largest[p] = found[p] > largest[p] ? found[p] : largest[p];
#endif
        }
    }
#if SEGMENTED
    __syncthreads();
    return most;
#else
    __syncwarp();
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < PATHS; ++p) {
        largest[p] = warp_max(largest[p]);
        if (lane == 0) most[p * 32 + warp] = largest[p];
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PATHS; ++p) own[p] = warp_max(lane < warps ? most[p * 32 + lane] : 0);
    return own;
#endif
}
#endif

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
    float* __restrict__ scale,         // (segments * PATHS, scale_rows)
    int scale_rows,                    // rows, or 1
    uint8* __restrict__ out,           // (rows, width) bytes, or half of them
    uint8* __restrict__ shifts) {      // (rows, width / GROUP), packed QuaRTZ only
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const bool live = row < rows;

    // Read: everything is on its way before anything is used.
    Columns at[CHUNKS];
    uint32 raw[CHUNKS][WORDS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        at[c] = columns_at((c * blockDim.x + threadIdx.x) * 16, packed, source, segments, width, duals);
        load16(raw[c], x + (live ? row : 0) * row_bytes + (int64)at[c].source * IN_BYTES, live ? at[c].count : 0);
    }

#if DYNAMIC
    SQ_SHARED(shared);
    uint32 own[PATHS];
    const uint32* most = find_largest(raw, at, smooth, (uint32*)shared + threadIdx.y * (SEGMENTED ? segments : 32) * PATHS, own, segments);
    if (live && threadIdx.x == 0 && !SEGMENTED)
#pragma unroll
        for (int p = 0; p < PATHS; ++p) scale[(int64)p * scale_rows + row] = exact_scale(most, 0, p, at[0].two);
    if (live && SEGMENTED)
        for (int i = threadIdx.x; i < segments * PATHS; i += blockDim.x)
            scale[(int64)i * scale_rows + row] = exact_scale(most, i / PATHS, i % PATHS, two_steps(duals, i / PATHS));
#endif

    // Divide, round, pack, write.
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int place = at[c].place;
        float inverse[PATHS], step[PATHS];
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
#if DYNAMIC
            inverse[p] = inverse_scale(magnitude_of(most, at[c].segment, p, at[c].two), code_range(at[c].two && p));
#else
            step[p] = scale[(int64)(at[c].segment * PATHS + (at[c].two ? p : 0)) * scale_rows + (scale_rows > 1 && live ? row : 0)];
            inverse[p] = inverse_scale(step[p], 1.f);
#endif
        }
        float value[16];
        to_values(value, raw[c], smooth + place, at[c].count);
        uint32 code[16];
        bool doubtful = false;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float by = DUAL && value[i] < 0.f ? inverse[PATHS - 1] : inverse[0];
#if FORMAT == 3
            code[i] = e4m3_by_product(value[i], by, doubtful);
#else
            code[i] = code_by_product(value[i], by, LOWEST, HIGHEST, doubtful);
#endif
        }
        if (doubtful) {
#if DYNAMIC
#pragma unroll
            for (int p = 0; p < PATHS; ++p) step[p] = exact_scale(most, at[c].segment, p, at[c].two);
#endif
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float by = DUAL && value[i] < 0.f ? step[PATHS - 1] : step[0];
#if FORMAT == 3
                code[i] = e4m3_by_division(value[i], by);
#else
                code[i] = code_by_division(value[i], by, LOWEST, HIGHEST);
#endif
            }
        }
        __syncwarp();  // a few lanes were away: write together again

#if QUARTZ
        // The magnitudes of a group lose the low bits that its largest one cannot spare.
        uint32 bits = 0, magnitude[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int signed_code = (int8)code[i];
            magnitude[i] = (uint32)(signed_code < 0 ? -signed_code : signed_code);
            bits |= magnitude[i];
        }
#if GROUP == 32
        bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
#endif
        const int length = 32 - __clz((int)bits), shift = length > 3 ? length - 3 : 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32 kept = magnitude[i] >> shift << (FORMAT == 4 ? shift : 0);
            code[i] = (int8)code[i] < 0 ? 0u - kept : kept;
        }
#endif

        if (!live || place >= width) continue;
        const int64 to = (int64)row * width + place;
#if FORMAT == 2 || FORMAT == 5
        struct alignas(8) Words2 { uint32 word[2]; } words = {{pack_halves(code), pack_halves(code + 8)}};
        *(Words2*)(out + to / 2) = words;
#if FORMAT == 5
        if (place % GROUP == 0) shifts[to / GROUP] = (uint8)shift;
#endif
#else
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) words.word[i] = pack_bytes(code[4 * i], code[4 * i + 1], code[4 * i + 2], code[4 * i + 3]);
        *(Words4*)(out + to) = words;
#endif
    }
}
