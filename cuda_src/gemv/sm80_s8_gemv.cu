// y = sum over terms of (scale_x · scale_w) · (codes_x · codes_w) + bias for 1 to 16 rows of x, limited by nothing but
// reading the weight once.
//
// There is one block for each multiprocessor. First it asks for as much of its rows of W as its ring holds. Meanwhile another
// kernel (sm80_s8_rows.cu) makes codes of x; when it is done, its results are copied to shared memory as they are. Then the warps
// multiply pieces of 32 rows x 64 bytes on int8 tensor cores: W is the first operand and the tokens are the columns of the second
// one, two columns each for dual scales. The warps' int32 sums are added up in shared memory, whoever comes first; in the end,
// and for W in batches if there is no room for the sums of all rows, they are scaled and the terms added in order.
//
// Fixed when compiled:
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   W_BITS     8, or 4: two columns per byte
//   TILES      columns of the second operand, in eights
//   DUAL       the sign of a code of x selects its scale
//   SPANS      columns that share their scales: 0 all, 1 each span in turn by all warps, 2 each span by one warp
//   GROUPED    spans are groups of columns of W inside of segments, which are added up before the scale of x
//   WARPS      of a block
//   STAGES     pieces of the ring
//   OVERLAP    was this kernel started before the one that makes the codes has ended?
#include "gemv/dual.cuh"
#include "gemv/stream.cuh"
#include "mma/int8.cuh"

// Sums of a warp: value i of group g of tile n is in row 16 g + 8 * (i / 2) + l / 4, column 8 n + 2 * (l % 4) + i % 2.
struct Sums { int of[TILES][2][4]; };

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

// 32 rows of W times all tokens. With dual scales a token is two columns: one has its codes from zero on, the other one
// those below zero; where there are more columns than tokens no product is added for them.
SQ_INLINE void multiply_piece(Sums& sums, const Piece& w, const uint8* codes, int piece, int tokens, bool two) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        Words4 x[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            // Where there are fewer tokens the last one is multiplied again: a row of results that nobody reads.
            const int wanted = (n * 8 + lane / 4) / PATHS, token = wanted < tokens ? wanted : tokens - 1;
            x[n] = *(const Words4*)(codes + ((piece * VECTORS + v) * tokens + token) * 64 + lane % 4 * 16);
#if DUAL
            const uint32 other = lane / 4 % 2 ? 0 : 0xffffffffu;
#pragma unroll
            for (int i = 0; i < 4; ++i) x[n].word[i] &= (two ? negative_bytes(x[n].word[i]) : 0) ^ other;
#endif
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const Operand rows = weight_operand(w.row[2 * g], w.row[2 * g + 1], 2 * v + i);
#pragma unroll
                for (int n = 0; n < TILES; ++n) multiply_add(sums.of[n][g], rows.word, x[n].word[2 * i], x[n].word[2 * i + 1]);
            }
    }
}

SQ_INLINE int true_sum(int sum) { return W_BITS == 4 ? sum >> 4 : sum; }

// The integer, rounded to float, times the product of the two scales.
SQ_INLINE float scaled(int sum, float x, float w) { return __fmul_rn(__int2float_rn(sum), __fmul_rn(x, w)); }

// Adds the sums of a lane to those in (columns, pitch), of which `rows` of the tile and `columns` exist. An addition takes the
// memory several times as long as a store: what all lanes would add to rows or columns that do not exist is left out. With one
// span there is room for whole tiles of columns, and nothing more to ask.
SQ_INLINE void add_sums(int* to, const Sums& sums, int rows, int columns, int pitch) {
    const int lane = threadIdx.x % 32, place = lane % 4 * 2 * pitch + lane / 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int column = n * 8 + i % 2;  // of the first lanes
            if (i / 2 * 8 >= rows || column >= columns) continue;
            if (!SPANS || column + lane % 4 * 2 < columns) atomicAdd(to + place + column * pitch + i / 2 * 8, sums.of[n][i / 4][i % 4]);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) s8_gemv(
    const uint8* __restrict__ made,     // for each group of tokens codes, then (terms, tokens) scales
    int made_bytes,                     // of a group
    int terms,                          // segments * PATHS
    const int* __restrict__ duals,      // (segments,) 1 where the sign matters; or null: everywhere
    const uint8* __restrict__ w,        // (N, width) codes, or half of these bytes
    const int* __restrict__ ends,       // (spans,) one past the last column of each
    const int* __restrict__ owners,     // (spans,) the segment of each, or null: it has the same number
    int spans,
    const float* __restrict__ scale_w,  // (spans or 1, N)
    int tables,                         // spans or 1: rows of scale_w
    int scale_rows,                     // how many rows of W have room for their scales and sums, a multiple of 32
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
    const Rows rows = block_rows(rows_each, blocks_with_more);
    const Weight weight = {w, width, ends, spans};

    uint8* const ring = shared;
    uint8* const codes = ring + STAGES * THREADS * PIECE_BYTES;
    const float* const steps = (const float*)(codes + codes_bytes(width, tokens));  // (terms, tokens)
    int* const met = (int*)(codes + made_bytes);                                    // (spans, columns, pitch)
    const int columns = tokens * PATHS, pitch = scale_rows + 4;                     // 4: no two lanes add to the same bank
    const int sums_span = (SPANS ? columns : 8 * TILES) * pitch;
    const RowScales scales = {(float*)(met + spans * sums_span), scale_rows, tables, scale_w, bias, N};

    const FirstScales first_scales = fetch_first(scales, rows.first, rows.last);
    Loader loader = start_loading(weight, rows, ring);
#pragma unroll 1
    for (int i = threadIdx.x; i < spans * sums_span; i += THREADS) met[i] = 0;
    store_scales(scales, first_scales, rows.first, rows.last);
    fetch_made(codes, made + blockIdx.y * made_bytes, made_bytes);
    __syncthreads();

    const Epilogue epilogue = {y, gate, gate_rows, residual, N};
    const int warp = threadIdx.x / 32;
#if SPANS == 2
    int span = warp;
#else
    int piece = warp;
#endif
    for (int first = rows.first; first < rows.last; first += scale_rows) {
        const int last = rows.last - first < scale_rows ? rows.last : first + scale_rows;
        if (first > rows.first) {
            __syncthreads();
            store_scales(scales, fetch_first(scales, first, last), first, last);
            __syncthreads();
        }
        for (int row = first; row < last; row += TILE_ROWS) {
#if SPANS == 2
            // Each warp multiplies whole spans and scales them.
            for (; span < spans; span += WARPS) {
                const Span at = span_at(ends, span, width);
                const int owner = owners ? owners[span] : span;
                const bool two = two_steps(duals, owner);
                Sums sums = {};
                for (int piece = 0; piece < at.pieces; ++piece)
                    multiply_piece(sums, next_piece(loader, weight, ring), codes, at.first + piece, tokens, two);
                float* const to = (float*)met + span * sums_span + row - first;
                const int lane = threadIdx.x % 32;
#pragma unroll
                for (int i = 0; i < TILES * 8; ++i) {
                    const int column = i / 8 * 8 + lane % 4 * 2 + i % 2, r = i % 8 / 2 * 8 + lane / 4;
                    if (column >= columns) continue;
                    const int sum = true_sum(sums.of[i / 8][i % 8 / 4][i % 4]);
#if GROUPED
                    to[column * pitch + r] = __int2float_rn(sum);
#else  // a segment without dual scales has one term: another zero changes no sum
                    const int p = column % PATHS;
                    to[column * pitch + r] = p && !two ? 0.f : scaled(sum, steps[(owner * PATHS + p) * tokens + column / PATHS], scale_of(scales, span, row - first + r));
#endif
                }
            }
            span -= spans;
#else
            // Warps take turns with the pieces. Integers do not mind the order in which they are added.
#pragma unroll 1
            for (int span = 0; span < (SPANS ? spans : 1); ++span) {
                const Span at = span_at(ends, span, width);
                const bool two = two_steps(duals, SPANS && owners ? owners[span] : span);
                if (piece < at.pieces) {
                    Sums sums = {};
                    for (; piece < at.pieces; piece += WARPS)
                        multiply_piece(sums, next_piece(loader, weight, ring), codes, at.first + piece, tokens, two);
                    add_sums(met + span * sums_span + row - first, sums, last - row, columns, pitch);
                }
                piece -= at.pieces;
            }
#endif
        }
        __syncthreads();
        for_results(tokens, first, last, [&](int token, int row) {
            const int place = row - first;
            float value = 0.f;
#if GROUPED
            float within[PATHS] = {};  // of the groups of a segment so far
#endif
#pragma unroll 1
            for (int span = 0; span < (SPANS ? spans : 1); ++span) {
                const int owner = SPANS && owners ? owners[span] : span;
                const bool two = two_steps(duals, owner);
#pragma unroll
                for (int p = 0; p < PATHS; ++p) {
                    if (p && !two) continue;
                    int* const sum = met + span * sums_span + (token * PATHS + p) * pitch + place;
#if GROUPED
                    within[p] = fmaf(SPANS == 2 ? __uint_as_float(*sum) : __int2float_rn(true_sum(*sum)), scale_of(scales, span, place), within[p]);
                    if (span + 1 == spans || owners[span + 1] != owner) {
                        value = __fadd_rn(value, __fmul_rn(within[p], steps[(owner * PATHS + p) * tokens + token]));
                        within[p] = 0.f;
                    }
#elif SPANS == 2
                    value = __fadd_rn(value, __uint_as_float(*sum));
#else
                    value = __fadd_rn(value, scaled(true_sum(*sum), steps[(owner * PATHS + p) * tokens + token], scale_of(scales, span, place)));
#endif
#if SPANS != 2
                    *sum = 0;  // for the next rows
#endif
                }
            }
            if (bias) value = __fadd_rn(value, scales.table[tables * scale_rows + place]);
            finish(epilogue, first_token + token, row, value);
        });
    }
}
