// A weight as a stream: the rows of a block, a tile of 32 at a time, cut into pieces that its warps share out.
//
// A piece is 32 rows x 64 bytes: lane l gets bytes 16 * (l % 4) … of rows l / 4, l / 4 + 8, l / 4 + 16 and l / 4 + 24. That
// is what two operands of a tensor core want to find in that lane, up to the order of the columns, which a product
// does not mind as long as the activations follow it. Pieces come ahead of time into a ring in shared memory in which each
// thread has places of its own: nobody else writes or reads them, so that no barrier is needed.
//
// Where a pair of scales ends, a *span* ends: a piece at a boundary is visited for both, each time without the other's columns.
#pragma once
#include "common/memory.cuh"

#if W_BITS == 4
#define LANE_COLUMNS 32
#else
#define LANE_COLUMNS 16
#endif
#define PIECE_COLUMNS (4 * LANE_COLUMNS)
#define TILE_ROWS 32
#define PIECE_BYTES 64  // of a lane
#define THREADS (32 * WARPS)

// Columns that share their scales.
struct Span {
    int start, end;          // columns
    int first, pieces;       // pieces that have columns of it
};

SQ_INLINE Span span_at(const int* ends, int span, int width) {
    Span s;
#if SPANS
    s.start = span ? ends[span - 1] : 0;
    s.end = ends[span];
#else
    s.start = 0;
    s.end = width;
#endif
    s.first = s.start / PIECE_COLUMNS;
    s.pieces = (s.end + PIECE_COLUMNS - 1) / PIECE_COLUMNS - s.first;
    return s;
}

// The rows of this block: all blocks have as many, give or take one. (64-bit divisions would take longer than the first bytes of W.)
struct Rows { int first, last; };

SQ_INLINE Rows block_rows(int rows_each, int blocks_with_more) {
    const int block = blockIdx.x, more = block < blocks_with_more;
    Rows r;
    r.first = block * rows_each + (more ? block : blocks_with_more);
    r.last = r.first + rows_each + more;
    return r;
}

struct Weight {
    const uint8* codes;      // (N, width) int8, or two int4 per byte
    int width;               // columns, a multiple of 64
    const int* ends;         // (spans,) one past the last column of each
    int spans;
};

// Loads the pieces of a warp in the order in which it will use them.
struct Loader {
    Span at;
    int span, piece;         // of the tile
    int row, last;           // of the tile, and of the block
    int place;               // in the ring
    const uint8* from;       // this lane's part of the first piece of its first row; the others are eight rows apart
    int64 row_bytes;
};

// Into the tile, and the span, that the count has reached.
SQ_INLINE void settle(Loader& l, const Weight& w) {
#if SPANS == 2  // whole spans are shared out
    while (l.span >= w.spans && l.row < l.last) {
        l.span -= w.spans;
        l.row += TILE_ROWS;
        l.from += TILE_ROWS * l.row_bytes;
    }
    if (l.row < l.last) l.at = span_at(w.ends, l.span, w.width);
#else
    while (l.piece >= l.at.pieces && l.row < l.last) {
        l.piece -= l.at.pieces;
#if SPANS
        const bool end = l.span + 1 == w.spans;
        l.span = end ? 0 : l.span + 1;
        l.at = span_at(w.ends, l.span, w.width);
#else
        const bool end = true;
#endif
        if (end) {
            l.row += TILE_ROWS;
            l.from += TILE_ROWS * l.row_bytes;
        }
    }
#endif
}

SQ_INLINE void load_piece(Loader& l, const Weight& w, uint8* ring) {
    if (l.row < l.last) {
        const int lane = threadIdx.x % 32, piece = l.at.first + l.piece;
        const uint8* const from = l.from + piece * 64;
        uint8* const to = ring + (l.place * 4 * THREADS + threadIdx.x) * 16;
#if SPANS || W_BITS == 4
        const int column = piece * PIECE_COLUMNS + lane % 4 * LANE_COLUMNS;
        const int last = column >= l.at.start && column < l.at.end ? l.last : 0;
#else
        const int last = l.last;
#endif
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool exists = l.row + lane / 4 + i * 8 < last;
            copy16_async_once(to + i * THREADS * 16, exists ? from + i * 8 * l.row_bytes : w.codes, exists);
        }
#if SPANS == 2
        if (++l.piece == l.at.pieces) {
            l.piece = 0;
            l.span += WARPS;
            settle(l, w);
        }
#else
        l.piece += WARPS;
        settle(l, w);
#endif
    }
    copies_commit();
    l.place = l.place + 1 == STAGES ? 0 : l.place + 1;
}

// Asks for as much as the ring has room for.
SQ_INLINE Loader start_loading(const Weight& w, const Rows& rows, uint8* ring) {
    const int lane = threadIdx.x % 32;
    Loader l;
    l.at = span_at(w.ends, 0, w.width);
    l.span = SPANS == 2 ? threadIdx.x / 32 : 0;
    l.piece = SPANS == 2 ? 0 : threadIdx.x / 32;
    l.row = rows.first;
    l.last = rows.last;
    l.place = 0;
    l.row_bytes = (int64)w.width * W_BITS / 8;
    l.from = w.codes + (rows.first + lane / 4) * l.row_bytes + lane % 4 * 16;
    settle(l, w);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) load_piece(l, w, ring);
    return l;
}

// The next piece of a thread, once it has landed; the place that was read before this one is filled again.
struct Piece { Words4 row[4]; };  // l / 4 and every eighth one from there

SQ_INLINE Piece next_piece(Loader& loader, const Weight& w, uint8* ring) {
    copies_wait<STAGES - 2>();
    // The loader is one place short of a round ahead.
    const int place = loader.place + 1 == STAGES ? 0 : loader.place + 1;
    const Words4* const from = (const Words4*)ring + place * 4 * THREADS + threadIdx.x;
    const Piece p = {{from[0], from[THREADS], from[2 * THREADS], from[3 * THREADS]}};
    load_piece(loader, w, ring);
    return p;
}

// The scales and the bias of the rows of a block. They lie in shared memory, because every read from far away takes longer
// than a tile; where all of them are too many, some rows at a time.
struct RowScales {
    float* table;            // (spans or 1, rows), then (rows,) of the bias
    int rows;                // room
    int tables;              // spans or 1: scales in a row's column
    const float* scale_w;    // (tables, N)
    const float* bias;       // (N,), or null
    int N;
};

// One row of the table, from a thread on; the last one is the bias.
SQ_INLINE float fetch_scale(const RowScales& s, int table, int place, int first, int last) {
    const float* const from = table < s.tables ? s.scale_w + (int64)table * s.N : s.bias;
    return from && place < s.rows && first + place < last ? from[first + place] : 0.f;
}

// The first scale and the bias of a thread wait in registers until the weight is on its way.
struct FirstScales { float scale, bias; };

SQ_INLINE FirstScales fetch_first(const RowScales& s, int first, int last) {
    return {fetch_scale(s, 0, threadIdx.x, first, last), fetch_scale(s, s.tables, threadIdx.x, first, last)};
}

SQ_INLINE void store_scales(const RowScales& s, const FirstScales& known, int first, int last) {
#pragma unroll 1
    for (int table = 0; table <= s.tables; ++table)
#pragma unroll 1
        for (int place = threadIdx.x; place < s.rows; place += THREADS) {
            float value;
            if (place < THREADS && table == 0) value = known.scale;
            else if (place < THREADS && table == s.tables) value = known.bias;
            else value = fetch_scale(s, table, place, first, last);
            s.table[table * s.rows + place] = value;
        }
}

// Where the scales of a tile lie; all threads of a block ask together.
SQ_INLINE const float* scales_of_tile(const RowScales& s, int first, int row, int last) {
    const int place = (row - first) % s.rows;
    if (place == 0 && row > first) {
        __syncthreads();
        store_scales(s, fetch_first(s, row, last), row, last);
        __syncthreads();
    }
    return s.table + place;
}

// One value of y.
SQ_INLINE void store_value(void* y, int64 at, float value) {
#if OUTPUT == 2
    ((float*)y)[at] = value;
#else
    ((uint16*)y)[at] = (uint16)(OUTPUT == 1 ? floats_to_halfx2(value, 0.f) : floats_to_bfloat16x2(value, 0.f));
#endif
}

SQ_INLINE float load_value(const void* y, int64 at) {
#if OUTPUT == 2
    return ((const float*)y)[at];
#else
    uint16 bits = ((const uint16*)y)[at];
    return OUTPUT == 1 ? half_to_float(bits) : bfloat16_to_float(bits);
#endif
}

// Values of y of a tile that a thread makes: 32 rows for each token, one thread after the other.
#define MINE (TILES * 8 * TILE_ROWS / THREADS)

// What comes after the product: bias, and residual + gate · y.
struct Epilogue {
    void* y;                 // (M, N)
    const float* gate;       // (M / gate_rows, N), or null: 1
    int gate_rows;
    const void* residual;    // (M, N) as y, or null
    int N;
};

SQ_INLINE void finish(const Epilogue& e, int token, int row, float value) {
    const int64 at = (int64)token * e.N + row;
    if (e.residual) value = fmaf(e.gate ? e.gate[(int64)(token / e.gate_rows) * e.N + row] : 1.f, value, load_value(e.residual, at));
    store_value(e.y, at, value);
}
