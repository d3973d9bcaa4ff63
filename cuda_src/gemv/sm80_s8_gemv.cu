// y = sum over terms of (scale_x · scale_w) · (codes_x · codes_w) + bias for 1 to 16 rows of x, limited by nothing but
// reading the weight once. The activations are quantized here, too: it is the whole linear in one launch.
//
// There is one block for each multiprocessor. First it asks for as much of its rows of W as its ring holds; while
// that is on its way, it quantizes x, every block for itself. Then its warps multiply pieces of 32 rows x 64 bytes on int8
// tensor cores: W is the first operand and the tokens are the columns of the second one. The warps' int32 sums meet in
// shared memory, where one thread for each value of y scales and adds the terms in order.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16, 2 float32, 3 codes
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   W_BITS     8, or 4: two columns per byte
//   X_BITS     8, or 4: what x is quantized to
//   TILES      tokens, in eights
//   DUAL       the sign of a code of x selects its scale
//   DYNAMIC    the scales of x are found here; otherwise they are read
//   SMOOTH     columns are multiplied with a vector first
//   SILU       x is an input of a SiLU
//   SEGMENTED  x has more than one segment
//   ALIGNED    rows and segments of x start at multiples of 16 bytes, and have a multiple of 8 columns
//   SPANS      columns that share their scales: 0 all, 1 each span in turn by all warps, 2 each span by one warp
//   WARPS      of a block
//   STAGES     pieces of the ring
#include "gemv/activations.cuh"
#include "gemv/stream.cuh"
#include "mma/int8.cuh"

#define PATHS (DUAL ? 2 : 1)
#define VECTORS (PIECE_COLUMNS / 64)  // of 16 codes that a lane has of a piece
#if X_BITS == 4
#define HIGHEST 7.f
#define LOWEST -8.f
#else
#define HIGHEST 127.f
#define LOWEST -128.f
#endif

// Where eight columns of codes lie: as the lanes read them, 16 bytes a lane, the tokens of a piece one after the other.
SQ_INLINE int code_place(int vector, int token, int tokens) {
    const int piece = vector / (8 * VECTORS), inside = vector % (8 * VECTORS);  // 2 * VECTORS of these to a lane
    const int lane = inside / (2 * VECTORS), part = inside / 2 % VECTORS;
    return ((piece * VECTORS + part) * tokens + token) * 64 + lane * 16 + inside % 2 * 8;
}

// int4 codes of W are multiplied as they come out of their bytes, first those of even columns, then those of odd ones.
SQ_INLINE Words2 in_order(uint32 columns0to3, uint32 columns4to7) {
#if W_BITS == 4
    return {{pick_bytes(columns0to3, columns4to7, 0x6420), pick_bytes(columns0to3, columns4to7, 0x7531)}};
#else
    return {{columns0to3, columns4to7}};
#endif
}

SQ_INLINE bool two_steps(const int* duals, int segment) { return DUAL && (!duals || duals[segment]); }

#if INPUT == 3
SQ_INLINE void copy_codes(uint8* to, const Input& in, int tokens, const Batch<Words4>& first) {
    const int vectors = in.width / 16;
    for_vectors<WARPS>(in, tokens, vectors, first, read_codes, [&](int token, int vector, const Words4& c) {
        if (vector >= vectors) return;
        *(Words2*)(to + code_place(vector * 2, token, tokens)) = in_order(c.word[0], c.word[1]);
        *(Words2*)(to + code_place(vector * 2 + 1, token, tokens)) = in_order(c.word[2], c.word[3]);
    }, [](int) {});
}
#else

SQ_INLINE void to_values(float (&value)[8], const Raw& raw, const float* smooth, int place) {
#if SMOOTH
    const Words4 factor[2] = {load_constant(smooth + place), load_constant(smooth + place + 4)};
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value[i] = raw_value(raw, i);
#if SMOOTH
        value[i] = __fmul_rn(value[i], __uint_as_float(factor[i / 4].word[i % 4]));
#endif
    }
}

// The first value of eight from which i have been shifted out.
SQ_INLINE float smoothed(const Raw& raw, const float* factors, int i) {
#if SMOOTH
    return __fmul_rn(raw_value(raw, 0), factors[i]);
#else
    return raw_value(raw, 0);
#endif
}

// The magnitude of the largest and of the smallest of eight values, zero between them; NaN and infinity do not count.
SQ_INLINE void magnitudes_of(uint32 (&found)[2], const Raw& raw, const float (&value)[8], const float* smooth) {
    float low = 0.f, high = 0.f;
#if INPUT == 2 || SMOOTH
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        low = fminf(low, value[i]);
        high = fmaxf(high, value[i]);
    }
#else  // two at a time
    Raw least = {}, most = {};
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        least.word[0] = INPUT ? halfx2_min(least.word[0], raw.word[i]) : bfloat16x2_min(least.word[0], raw.word[i]);
        most.word[0] = INPUT ? halfx2_max(most.word[0], raw.word[i]) : bfloat16x2_max(most.word[0], raw.word[i]);
    }
    low = fminf(raw_value(least, 0), raw_value(least, 1));
    high = fmaxf(raw_value(most, 0), raw_value(most, 1));
#endif
    found[0] = __float_as_uint(high) & 0x7fffffffu;
    found[1] = __float_as_uint(low) & 0x7fffffffu;
    if (found[0] < 0x7f800000u && found[1] < 0x7f800000u) return;
    found[0] = found[1] = 0;
    Raw rest = raw;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const float x = smoothed(rest, smooth, i);
        const uint32 magnitude = finite_magnitude(x);
        if (x < 0.f) found[1] = magnitude > found[1] ? magnitude : found[1];
        else found[0] = magnitude > found[0] ? magnitude : found[0];
        rest = shifted(rest);
    }
}

SQ_INLINE float code_range(bool below) { return below ? -LOWEST : HIGHEST; }

// The largest magnitude of each term of each token.
SQ_INLINE void find_largest(uint32* most, const Input& in, const float* smooth, const int* duals, int tokens, const Batch<Raw>& first) {
#if !SEGMENTED
    uint32 largest[PATHS] = {};
#endif
    for_vectors<WARPS>(in, tokens, in.width / 8, first, read_values, [&](int token, int vector, const Raw& raw) {
        const int place = vector * 8;
#if SEGMENTED
        const int segment = columns_at(in, place).segment;
#else
        const int segment = 0;
#endif
        float value[8];
        uint32 found[2];
        to_values(value, raw, smooth, place < in.width ? place : 0);
        magnitudes_of(found, raw, value, smooth + (place < in.width ? place : 0));
        if (!two_steps(duals, segment)) {
            found[0] = found[1] > found[0] ? found[1] : found[0];
            found[1] = 0;
        }
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
#if SEGMENTED
            // A maximum does not depend on the order: atomics keep it deterministic.
            if (place < in.width) atomicMax(most + (segment * PATHS + p) * tokens + token, found[p]);
#else
            largest[p] = found[p] > largest[p] ? found[p] : largest[p];
#endif
        }
    }, [&](int token) {
#if !SEGMENTED
        __syncwarp();
#pragma unroll
        for (int p = 0; p < PATHS; ++p) {
            const uint32 of_warp = warp_max(largest[p]);
            if (threadIdx.x % 32 == 0) atomicMax(most + p * tokens + token, of_warp);
            largest[p] = 0;
        }
#endif
    });
}

// A scale and its reciprocal, to divide by; no number where the reciprocal is not exact enough.
struct Divisor { float scale, reciprocal; };

SQ_INLINE Divisor divisor_of(float scale) {
    const bool usual = scale > 0x1p-60f && scale < 0x1p60f;
    return {scale, usual ? __frcp_rn(scale) : __uint_as_float(0x7fc00000u)};
}

// x / scale, rounded as a division: what the product with the reciprocal leaves is exact, and corrects it. Twice, as
// the first correction may still be off by one unit in the last place.
SQ_INLINE float divided(float x, const Divisor& by) {
    float q = __fmul_rn(x, by.reciprocal);
    q = fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);
    return fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);
}

// The codes of all tokens. `from` are magnitudes, if the scales come from those, or else the scales.
SQ_INLINE void quantize(uint8* to, const float* from, const Input& in, const float* smooth, const int* duals, int tokens, const Batch<Raw>& first) {
    const int vectors = in.width / 8;
    Divisor by[PATHS];
    int known = -1;  // the token that they are of
    for_vectors<WARPS>(in, tokens, vectors, first, read_values, [&](int token, int vector, const Raw& raw) {
        if (vector >= vectors) return;
#if SEGMENTED
        const int segment = columns_at(in, vector * 8).segment;
#else
        const int segment = 0;
#endif
        const bool two = two_steps(duals, segment);
        float value[8];
        to_values(value, raw, smooth, vector * 8);
        if (SEGMENTED || token != known) {
#pragma unroll
            for (int p = 0; p < PATHS; ++p) {
                const float given = from[(segment * PATHS + (two ? p : 0)) * tokens + token];
                by[p] = divisor_of(DYNAMIC ? usable_scale(__fdiv_rn(given, code_range(two && p))) : given);
            }
            known = token;
        }
        uint32 code[8];
        bool usual = true;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float quotient = divided(value[j], DUAL && value[j] < 0.f ? by[PATHS - 1] : by[0]);
            // A finite x has no way out of the range that its scale comes from; infinity and NaN are for the loop below.
            usual &= fabsf(quotient) < 0x1p30f;
            if (!DYNAMIC) quotient = fminf(fmaxf(quotient, LOWEST), HIGHEST);
            code[j] = __float_as_uint(__fadd_rn(quotient, SQ_ROUNDER));
        }
        uint32 word[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
            word[j] = pick_bytes(pick_bytes(code[4 * j], code[4 * j + 1], 0x0040), pick_bytes(code[4 * j + 2], code[4 * j + 3], 0x0040), 0x5410);
        if (!usual) {  // rare, and short rather than fast
            Raw rest = raw;
#pragma unroll 1
            for (int j = 0; j < 8; ++j) {
                const float x = smoothed(rest, smooth + vector * 8, j);
                word[0] = word[0] >> 8 | word[1] << 24;
                word[1] = word[1] >> 8 | code_by_division(x, DUAL && x < 0.f ? by[PATHS - 1].scale : by[0].scale, LOWEST, HIGHEST) << 24;
                rest = shifted(rest);
            }
        }
        *(Words2*)(to + code_place(vector, token, tokens)) = in_order(word[0], word[1]);
    }, [](int) {});
}
#endif

// Sums of a warp: value i of group g of tile n is in row 16 g + 8 * (i / 2) + l / 4, token 8 n + 2 * (l % 4) + i % 2.
struct Sums { int of[PATHS][TILES][2][4]; };

// Eight columns of a lane, of 16 rows of W, as an operand.
struct Operand { uint32 word[4]; };

SQ_INLINE Operand weight_operand(const Words4& low, const Words4& high, int part) {
#if W_BITS == 4
    // Sixteen times the code is where the code is the high half of its byte; the sum is divided in the end.
    const uint32 a = low.word[part], b = high.word[part];
    return {{a << 4 & 0xf0f0f0f0u, b << 4 & 0xf0f0f0f0u, a & 0xf0f0f0f0u, b & 0xf0f0f0f0u}};
#else
    return {{low.word[2 * part], high.word[2 * part], low.word[2 * part + 1], high.word[2 * part + 1]}};
#endif
}

// 32 rows of W times eight tokens, 32 columns. Dual scales split the codes of the tokens by their sign.
SQ_INLINE void multiply_tokens(Sums& sums, int n, const Operand (&w)[2], uint32 x0, uint32 x1, bool two) {
#if DUAL
    const uint32 negative0 = two ? x0 & negative_bytes(x0) : 0, negative1 = two ? x1 & negative_bytes(x1) : 0;
    x0 ^= negative0;
    x1 ^= negative1;
#endif
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        multiply_add(sums.of[0][n][g], w[g].word, x0, x1);
#if DUAL
        if (two) multiply_add(sums.of[1][n][g], w[g].word, negative0, negative1);
#endif
    }
}

SQ_INLINE void multiply_piece(Sums& sums, const Piece& w, const uint8* codes, int piece, int tokens, bool two) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        Words4 x[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            // Where there are fewer tokens the last one is multiplied again: a row of results that nobody reads.
            const int wanted = n * 8 + lane / 4, token = wanted < tokens ? wanted : tokens - 1;
            x[n] = *(const Words4*)(codes + ((piece * VECTORS + v) * tokens + token) * 64 + lane % 4 * 16);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Operand rows[2] = {weight_operand(w.row[0], w.row[1], 2 * v + i), weight_operand(w.row[2], w.row[3], 2 * v + i)};
#pragma unroll
            for (int n = 0; n < TILES; ++n) multiply_tokens(sums, n, rows, x[n].word[2 * i], x[n].word[2 * i + 1], two);
        }
    }
}

SQ_INLINE int true_sum(int sum) { return W_BITS == 4 ? sum >> 4 : sum; }

// The integer, rounded to float, times the product of the two scales.
SQ_INLINE float scaled(int sum, float x, float w) { return __fmul_rn(__int2float_rn(sum), __fmul_rn(x, w)); }

// Calls `use(path, token, row of the tile, sum)` for the sums of a lane.
template <class Use> SQ_INLINE void for_sums(const Sums& sums, int tokens, Use use) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < PATHS; ++p)
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i % 2;
                if (token < tokens) use(p, token, i / 2 * 8 + lane / 4, sums.of[p][n][i / 4][i % 4]);
            }
}

// The values of y of a tile that a thread makes, and how many of them there are.
struct Mine { int tokens, rows; };

template <class Use> SQ_INLINE void for_mine(const Mine& mine, float (&total)[MINE], Use use) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int token = threadIdx.x / TILE_ROWS + i * (THREADS / TILE_ROWS);
        if (token < mine.tokens && (int)threadIdx.x % TILE_ROWS < mine.rows) use(token, total[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) s8_gemv(
    const uint8* __restrict__ x,        // (M, columns), row_bytes apart; codes: (M, width) int8
    int64 row_bytes,
    int columns,                        // of x
    const int* __restrict__ packed,     // (segments,) first packed column of each segment
    const int* __restrict__ source,     // (segments + 1,) its first column in x; last: columns of x
    int segments,
    const float* __restrict__ smooth,   // (width,) to multiply with
    const int* __restrict__ duals,      // (segments,) 1 where the sign matters; or null: everywhere
    const float* __restrict__ scale_x,  // (segments * PATHS, scale_tokens), if it is given
    int scale_tokens,                   // M, or 1: the same for all tokens
    const uint8* __restrict__ w,        // (N, width) codes, or half of these bytes
    const int* __restrict__ ends,       // (spans,) one past the last column of each
    const int* __restrict__ owners,     // (spans,) the segment of each, or null: it has the same number
    int spans,
    const float* __restrict__ scale_w,  // (spans or 1, N)
    int tables,                         // spans or 1: rows of scale_w
    int scale_rows,                     // how many rows of W have room for their scales
    const float* __restrict__ bias,     // (N,), or null
    void* __restrict__ y,               // (M, N)
    int M, int N, int width,            // width: a multiple of 64
    int rows_each,                      // of W for each block
    int blocks_with_more,               // the first ones, with one row more
    int group,                          // tokens of a block at most
    const float* __restrict__ gate,     // (M / gate_rows, N), or null: 1
    int gate_rows,
    const void* __restrict__ residual) {  // (M, N), as y
    SQ_SHARED(shared);
    const int first_token = blockIdx.y * group, tokens = M - first_token < group ? M - first_token : group;
    const int terms = segments * PATHS;
    const Rows rows = block_rows(rows_each, blocks_with_more);
    const Weight weight = {w, width, ends, spans};
    const Input in = {x + first_token * row_bytes, row_bytes, packed, source, segments, columns, width};

    uint8* const ring = shared;
    uint8* const codes = ring + STAGES * THREADS * PIECE_BYTES;
    float* const steps = (float*)(codes + (width + PIECE_COLUMNS - 1) / PIECE_COLUMNS * PIECE_COLUMNS * tokens);  // (terms, tokens)
    int* const parts = (int*)(steps + (terms * tokens * 2 + 3) / 4 * 4);
    const RowScales scales = {(float*)(parts + 2 * (SPANS == 2 ? spans : WARPS) * PATHS * tokens * TILE_ROWS), scale_rows, tables, scale_w, bias, N};

    // What will be wanted first is asked for first; then the weight sets out.
    const FirstScales first_scales = fetch_first(scales, rows.first, rows.last);
#if !DYNAMIC
    auto given_step = [&](int i) { return scale_x[(int64)(i / tokens) * scale_tokens + (scale_tokens > 1 ? first_token + i % tokens : 0)]; };
    const float first_step = threadIdx.x < terms * tokens ? given_step(threadIdx.x) : 0.f;
#endif
#if INPUT == 3
    const Batch<Words4> first = read_first<WARPS>(in, tokens, read_codes);
#else
    const Batch<Raw> raw = read_first<WARPS>(in, tokens, read_values);
#endif
    Loader loader = start_loading(weight, rows, ring);

    // The activations become codes.
#if INPUT != 3
    const Batch<Raw> first = activated(raw);
#endif
#if DYNAMIC
    uint32* const most = (uint32*)(steps + terms * tokens);  // (terms, tokens)
#pragma unroll 1
    for (int i = threadIdx.x; i < terms * tokens; i += THREADS) most[i] = 0;
    __syncthreads();
    find_largest(most, in, smooth, duals, tokens, first);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < terms * tokens; i += THREADS) {
        const int term = i / tokens, p = term % PATHS;
        const bool two = two_steps(duals, term / PATHS);
        steps[i] = usable_scale(__fdiv_rn(__uint_as_float(most[two ? i : i - p * tokens]), code_range(two && p)));
    }
    quantize(codes, (const float*)most, in, smooth, duals, tokens, first);
#else
    if (threadIdx.x < terms * tokens) steps[threadIdx.x] = first_step;
#pragma unroll 1
    for (int i = threadIdx.x + THREADS; i < terms * tokens; i += THREADS) steps[i] = given_step(i);
#if INPUT == 3
    copy_codes(codes, in, tokens, first);
#else
    __syncthreads();
    quantize(codes, steps, in, smooth, duals, tokens, first);
#endif
#endif
    store_scales(scales, first_scales, rows.first, rows.last);
    __syncthreads();

    // One thread for each value of y of a tile, or for two.
    const Epilogue epilogue = {y, gate, gate_rows, residual, N};
    const int row_in_tile = threadIdx.x % TILE_ROWS;
    int turn = 0;
#if SPANS == 2
    int span = threadIdx.x / 32;
#else
    int piece = threadIdx.x / 32;
#endif
    for (int row = rows.first; row < rows.last; row += TILE_ROWS) {
        const float* const row_scales = scales_of_tile(scales, rows.first, row, rows.last);
        float total[MINE] = {};
        const Mine mine = {tokens, rows.last - row};
#if SPANS == 2
        // Each warp multiplies whole spans and scales them; their terms meet in shared memory.
        float* const met = (float*)parts + turn * spans * PATHS * tokens * TILE_ROWS;  // (spans, PATHS, tokens, 32)
        for (; span < spans; span += WARPS) {
            const Span at = span_at(ends, span, width);
            const int owner = owners ? owners[span] : span;
            const bool two = two_steps(duals, owner);
            const float* const by = row_scales + (tables > 1 ? span : 0) * scale_rows;
            Sums sums = {};
            for (int piece = 0; piece < at.pieces; ++piece)
                multiply_piece(sums, next_piece(loader, weight, ring), codes, at.first + piece, tokens, two);
            for_sums(sums, tokens, [&](int p, int token, int r, int sum) {
                // A segment without dual scales has one term: another zero changes no sum.
                const float term = p && !two ? 0.f : scaled(true_sum(sum), steps[(owner * PATHS + p) * tokens + token], by[r]);
                met[((span * PATHS + p) * tokens + token) * TILE_ROWS + r] = term;
            });
        }
        span -= spans;
        __syncthreads();
        for_mine(mine, total, [&](int token, float& value) {
            for (int i = 0; i < spans * PATHS; ++i) value = __fadd_rn(value, met[(i * tokens + token) * TILE_ROWS + row_in_tile]);
        });
        turn ^= 1;
#else
#if SPANS
        for (int span = 0; span < spans; ++span) {
            const int owner = owners ? owners[span] : span;
#else
        {
            const int span = 0, owner = 0;
#endif
            const Span at = span_at(ends, span, width);
            const bool two = two_steps(duals, owner);
            Sums sums = {};
            for (; piece < at.pieces; piece += WARPS)
                multiply_piece(sums, next_piece(loader, weight, ring), codes, at.first + piece, tokens, two);
            piece -= at.pieces;

            int* const met = parts + turn * WARPS * PATHS * tokens * TILE_ROWS;  // (WARPS, PATHS, tokens, 32)
            for_sums(sums, tokens, [&](int p, int token, int r, int sum) {
                met[((threadIdx.x / 32 * PATHS + p) * tokens + token) * TILE_ROWS + r] = sum;
            });
            __syncthreads();
            for_mine(mine, total, [&](int token, float& value) {
#pragma unroll
                for (int p = 0; p < PATHS; ++p) {
                    if (p && !two) continue;
                    int sum = 0;
#pragma unroll
                    for (int warp = 0; warp < WARPS; ++warp) sum += met[((warp * PATHS + p) * tokens + token) * TILE_ROWS + row_in_tile];
                    const float by = row_scales[(tables > 1 ? span : 0) * scale_rows + row_in_tile];
                    value = __fadd_rn(value, scaled(true_sum(sum), steps[(owner * PATHS + p) * tokens + token], by));
                }
            });
            turn ^= 1;  // the next sums meet elsewhere: nobody waits for those who still read
        }
#endif
        for_mine(mine, total, [&](int token, float& value) {
            if (bias) value = __fadd_rn(value, row_scales[tables * scale_rows + row_in_tile]);
            finish(epilogue, first_token + token, row + row_in_tile, value);
        });
    }
}
