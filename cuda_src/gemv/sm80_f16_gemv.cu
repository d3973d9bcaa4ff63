// y = scale_w · (x · codes_w) + bias for 1 to 16 rows of x in 16-bit floats: only the weight is quantized.
//
// The stream of the weight, the blocks and the warps are those of sm80_s8_gemv.cu. Codes become 16-bit floats in
// registers, exactly, two at a time; products are summed in float32. With one scale for a row of W that is all,
// and the scale comes last; with scales for groups of columns each warp scales its sums piece by piece.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   W_BITS     8, or 4: two columns per byte
//   TILES      tokens, in eights
//   SILU       x is an input of a SiLU
//   SEGMENTED  x has more than one segment
//   ALIGNED    rows and segments of x start at multiples of 16 bytes, and have a multiple of 8 columns
//   GROUPED    a table says which scale the columns have, 32 at a time
//   WARPS      of a block
//   STAGES     pieces of the ring
#define SPANS 0
#include "gemv/activations.cuh"
#include "gemv/stream.cuh"
#include "mma/float16.cuh"

#define VECTORS (LANE_COLUMNS / 8)  // of 8 values that a lane has of a piece
#define BLOCKS (PIECE_COLUMNS / 32)

// Pairs of columns come out of the bytes of W apart; those of x follow.
SQ_INLINE Words4 in_order(const Raw& raw) {
    Words4 v;
#if W_BITS == 4  // 0 4, 1 5, 2 6, 3 7
    v.word[0] = pick_bytes(raw.word[0], raw.word[2], 0x5410);
    v.word[1] = pick_bytes(raw.word[0], raw.word[2], 0x7632);
    v.word[2] = pick_bytes(raw.word[1], raw.word[3], 0x5410);
    v.word[3] = pick_bytes(raw.word[1], raw.word[3], 0x7632);
#else  // 0 2, 1 3, 4 6, 5 7
    v.word[0] = pick_bytes(raw.word[0], raw.word[1], 0x5410);
    v.word[1] = pick_bytes(raw.word[0], raw.word[1], 0x7632);
    v.word[2] = pick_bytes(raw.word[2], raw.word[3], 0x5410);
    v.word[3] = pick_bytes(raw.word[2], raw.word[3], 0x7632);
#endif
    return v;
}

// To the last piece: columns that do not exist are zero.
SQ_INLINE void copy_values(uint8* to, const Input& in, int vectors, int tokens, const Batch<Raw>& first) {
    for_vectors<WARPS>(in, tokens, vectors, first, read_values, [&](int token, int vector, const Raw& raw) {
        if (vector >= vectors) return;
        const int piece = vector / (4 * VECTORS), inside = vector % (4 * VECTORS);  // VECTORS of these to a lane
        *(Words4*)(to + ((piece * VECTORS + inside % VECTORS) * tokens + token) * 64 + inside / VECTORS * 16) = in_order(raw);
    }, [](int) {});
}

// Sums of a warp: value i of group g of tile n is in row 16 g + 8 * (i / 2) + l / 4, token 8 n + 2 * (l % 4) + i % 2.
struct Sums { float of[TILES][2][4]; };

// Four columns of a lane, of 16 rows of W, as an operand.
struct Operand { uint32 word[4]; };

SQ_INLINE Operand weight_operand(const Words4& low, const Words4& high, int part) {
#if W_BITS == 4
    const uint32 a = low.word[part / 2] >> part % 2 * 8, b = high.word[part / 2] >> part % 2 * 8;
    return {{codes4_to_float16x2<INPUT == 1>(a), codes4_to_float16x2<INPUT == 1>(b), codes4_to_float16x2<INPUT == 1>(a >> 4), codes4_to_float16x2<INPUT == 1>(b >> 4)}};
#else
    const uint32 a = low.word[part], b = high.word[part];
    return {{codes8_to_float16x2<INPUT == 1>(a), codes8_to_float16x2<INPUT == 1>(b), codes8_to_float16x2<INPUT == 1>(a >> 8), codes8_to_float16x2<INPUT == 1>(b >> 8)}};
#endif
}

// Adds the product of a piece to `sums`. Of x only the columns of the lanes that `take` them; the others' are zero.
SQ_INLINE void multiply_columns(Sums& sums, const Piece& w, const uint8* values, int piece, int tokens, bool take) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        Words4 x[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            // Where there are fewer tokens the last one is multiplied again: a row of results that nobody reads.
            const int wanted = n * 8 + lane / 4, token = wanted < tokens ? wanted : tokens - 1;
            x[n] = *(const Words4*)(values + ((piece * VECTORS + v) * tokens + token) * 64 + lane % 4 * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[n].word[i] = take ? x[n].word[i] : 0;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const Operand rows = weight_operand(w.row[2 * g], w.row[2 * g + 1], 2 * v + i);
#pragma unroll
                for (int n = 0; n < TILES; ++n) multiply_add_float16<INPUT == 1>(sums.of[n][g], rows.word, x[n].word[2 * i], x[n].word[2 * i + 1]);
            }
    }
}

SQ_INLINE void multiply_piece(Sums& sums, const Piece& w, const uint8* values, int piece, int tokens, const int* scale_of, const float* scales, int scale_rows) {
#if GROUPED
    // Mostly one scale for all columns of the piece; otherwise once for each, the others' columns being zero.
    const int lane = threadIdx.x % 32, my_scale = scale_of[piece * BLOCKS + lane % 4 * BLOCKS / 4], last_scale = scale_of[piece * BLOCKS + BLOCKS - 1];
#pragma unroll 1
    for (int scale = scale_of[piece * BLOCKS]; scale <= last_scale; ++scale) {
        Sums part = {};
        multiply_columns(part, w, values, piece, tokens, my_scale == scale);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float by = scales[scale * scale_rows + i / 2 * 8 + lane / 4];
#pragma unroll
            for (int n = 0; n < TILES; ++n) sums.of[n][i / 4][i % 4] = fmaf(part.of[n][i / 4][i % 4], by, sums.of[n][i / 4][i % 4]);
        }
    }
#else
    multiply_columns(sums, w, values, piece, tokens, true);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) f16_gemv(
    const uint8* __restrict__ x,        // (M, columns), row_bytes apart
    int64 row_bytes,
    int columns,                        // of x
    const int* __restrict__ packed,     // (segments,) first packed column of each segment
    const int* __restrict__ source,     // (segments + 1,) its first column in x; last: columns of x
    int segments,
    const uint8* __restrict__ w,        // (N, width) codes, or half of these bytes
    const int* __restrict__ scale_of,   // (4 * ceil(width / 128),) which scale 32 columns have, never falling; GROUPED only
    const float* __restrict__ scale_w,  // (tables, N)
    int tables,                         // scales of a row
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
    const int lane = threadIdx.x % 32, pieces = (width + PIECE_COLUMNS - 1) / PIECE_COLUMNS;
    const Rows rows = block_rows(rows_each, blocks_with_more);
    const Weight weight = {w, width, nullptr, 1};
    const Input in = {x + first_token * row_bytes, row_bytes, packed, source, segments, columns, width};

    uint8* const ring = shared;
    uint8* const values = ring + STAGES * THREADS * PIECE_BYTES;
    float* const parts = (float*)(values + pieces * PIECE_COLUMNS * 2 * tokens);  // 2 x (WARPS, tokens, 32)
    const RowScales scales = {parts + 2 * WARPS * tokens * TILE_ROWS, scale_rows, tables, scale_w, bias, N};

    // What will be wanted first is asked for first; then the weight sets out.
    const FirstScales first_scales = fetch_first(scales, rows.first, rows.last);
    const Batch<Raw> first = read_first<WARPS>(in, tokens, read_values);
    Loader loader = start_loading(weight, rows, ring);
    copy_values(values, in, pieces * (PIECE_COLUMNS / 8), tokens, activated(first));
    store_scales(scales, first_scales, rows.first, rows.last);
    __syncthreads();

    // One thread for each value of y of a tile, or for two.
    const Epilogue epilogue = {y, gate, gate_rows, residual, N};
    const int row_in_tile = threadIdx.x % TILE_ROWS;
    int turn = 0, piece = threadIdx.x / 32;
    for (int row = rows.first; row < rows.last; row += TILE_ROWS) {
        const float* const row_scales = scales_of_tile(scales, rows.first, row, rows.last);
        Sums sums = {};
        for (; piece < pieces; piece += WARPS)
            multiply_piece(sums, next_piece(loader, weight, ring), values, piece, tokens, scale_of, row_scales, scale_rows);
        piece -= pieces;

        float* const met = parts + turn * WARPS * tokens * TILE_ROWS;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i % 2;
                if (token < tokens) met[(threadIdx.x / 32 * tokens + token) * TILE_ROWS + i / 2 * 8 + lane / 4] = sums.of[n][i / 4][i % 4];
            }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int token = threadIdx.x / TILE_ROWS + i * (THREADS / TILE_ROWS);
            if (token >= tokens || row + row_in_tile >= rows.last) continue;
            float total = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) total = __fadd_rn(total, met[(warp * tokens + token) * TILE_ROWS + row_in_tile]);
            if (!GROUPED) total = __fmul_rn(total, row_scales[row_in_tile]);
            if (bias) total = __fadd_rn(total, row_scales[tables * scale_rows + row_in_tile]);
            finish(epilogue, first_token + token, row + row_in_tile, total);
        }
        turn ^= 1;  // the next sums meet elsewhere: nobody waits for those who still read
    }
}
