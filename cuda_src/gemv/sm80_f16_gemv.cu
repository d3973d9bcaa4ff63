// y = scale_w · (x · codes_w) + bias for 1 to 16 rows of x in 16-bit floats: only the weight is quantized.
//
// The stream of the weight, the blocks and the warps are those of sm80_s8_gemv.cu, and sm80_s8_rows.cu puts x in order. Codes become 16-bit floats in
// registers, exactly, two at a time; products are summed in float32. With one scale for a row of W that is all,
// and the scale comes last; with scales for groups of columns each warp scales its sums piece by piece.
//
// Fixed when compiled:
//   INPUT      0 bfloat16, 1 float16
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   W_BITS     8, or 4: two columns per byte
//   TILES      tokens, in eights
//   GROUPED    a table says which scale the columns have, 32 at a time
//   WARPS      of a block
//   STAGES     pieces of the ring
//   OVERLAP    was this kernel started before the one that puts x in order has ended?
#define SPANS 0
#include "gemv/stream.cuh"
#include "mma/float16.cuh"

#define BLOCKS (PIECE_COLUMNS / 32)

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
    for (int v = 0; v < LANE_COLUMNS / 8; ++v) {
        Words4 x[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            // Where there are fewer tokens the last one is multiplied again: a row of results that nobody reads.
            const int wanted = n * 8 + lane / 4, token = wanted < tokens ? wanted : tokens - 1;
            x[n] = *(const Words4*)(values + ((piece * (LANE_COLUMNS / 8) + v) * tokens + token) * 64 + lane % 4 * 16);
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
    const uint8* __restrict__ made,     // for each group of tokens 16-bit floats
    int made_bytes,                     // of a group
    const uint8* __restrict__ w,        // (N, width) codes, or half of these bytes
    const int* __restrict__ scale_of,   // (4 * ceil(width / 128),) which scale 32 columns have, never falling; GROUPED only
    const float* __restrict__ scale_w,  // (tables, N)
    int tables,                         // scales of a row
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
    const int lane = threadIdx.x % 32, pieces = (width + PIECE_COLUMNS - 1) / PIECE_COLUMNS;
    const Rows rows = block_rows(rows_each, blocks_with_more);
    const Weight weight = {w, width, nullptr, 1};

    uint8* const ring = shared;
    uint8* const values = ring + STAGES * THREADS * PIECE_BYTES;
    float* const met = (float*)(values + made_bytes);  // (WARPS, tokens, pitch)
    const int pitch = scale_rows + 4;                  // 4: no two lanes write to the same bank
    const RowScales scales = {met + WARPS * tokens * pitch, scale_rows, tables, scale_w, bias, N};

    const FirstScales first_scales = fetch_first(scales, rows.first, rows.last);
    Loader loader = start_loading(weight, rows, ring);
    store_scales(scales, first_scales, rows.first, rows.last);
    fetch_made(values, made + blockIdx.y * made_bytes, made_bytes);
    __syncthreads();

    const Epilogue epilogue = {y, gate, gate_rows, residual, N};
    int piece = threadIdx.x / 32;
    for (int first = rows.first; first < rows.last; first += scale_rows) {
        const int last = rows.last - first < scale_rows ? rows.last : first + scale_rows;
        if (first > rows.first) {
            __syncthreads();
            store_scales(scales, fetch_first(scales, first, last), first, last);
            __syncthreads();
        }
        for (int row = first; row < last; row += TILE_ROWS) {
            Sums sums = {};
            for (; piece < pieces; piece += WARPS)
                multiply_piece(sums, next_piece(loader, weight, ring), values, piece, tokens, scale_of, scales.table + row - first, scale_rows);
            piece -= pieces;
            float* const to = met + threadIdx.x / 32 * tokens * pitch + row - first;
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int token = n * 8 + lane % 4 * 2 + i % 2;
                    if (token < tokens) to[token * pitch + i / 2 * 8 + lane / 4] = sums.of[n][i / 4][i % 4];
                }
        }
        __syncthreads();
        for_results(tokens, first, last, [&](int token, int row) {
            const int place = row - first;
            float total = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) total = __fadd_rn(total, met[(warp * tokens + token) * pitch + place]);
            if (!GROUPED) total = __fmul_rn(total, scales.table[place]);
            if (bias) total = __fadd_rn(total, scales.table[tables * scale_rows + place]);
            finish(epilogue, first_token + token, row, total);
        });
    }
}
