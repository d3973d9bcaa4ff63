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
#include "common/output.cuh"
#include "common/overlap.cuh"
#include "gemv/layout.cuh"

#define TILE_ROWS 32
#define PIECE_BYTES 64  // of a lane
#define THREADS (32 * WARPS)
#define AT_ONCE 8

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

// To shared memory what the kernel before has made of the activations, once that kernel is done.
SQ_INLINE void fetch_made(uint8* to, const uint8* from, int bytes) {
    wait_for_kernel_before();
#pragma unroll 1
    for (int i = threadIdx.x; i < bytes / 16; i += AT_ONCE * THREADS) {
        Words4 words[AT_ONCE];  // all of them are on their way before one is waited for
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (i + j * THREADS < bytes / 16) words[j] = load_fresh(from + (i + j * THREADS) * 16);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (i + j * THREADS < bytes / 16) ((Words4*)to)[i + j * THREADS] = words[j];
    }
}

// The scales and the bias of the rows of a block, or of as many of them as there is room for: every read from far away
// takes longer than a tile.
struct RowScales {
    float* table;            // (spans or 1, rows), then (rows,) of the bias
    int rows;                // room, a multiple of TILE_ROWS
    int tables;              // spans or 1: scales in a row's column
    const float* scale_w;    // (tables, N)
    const float* bias;       // (N,), or null
    int N;
};

// What a span of a row of W is scaled with, by the row's place in the table.
SQ_INLINE float scale_of(const RowScales& s, int span, int place) { return s.table[(s.tables > 1 ? span : 0) * s.rows + place]; }

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
    const int thread = threadIdx.x;
    if (thread < s.rows) {
        s.table[thread] = known.scale;
        s.table[s.tables * s.rows + thread] = known.bias;
    }
    if (s.tables == 1 && s.rows <= THREADS) return;
#pragma unroll 1
    for (int i = thread; i < (s.tables + 1) * s.rows; i += THREADS) {
        const int table = i / s.rows, place = i - table * s.rows;
        if (place >= THREADS || table % s.tables) s.table[i] = fetch_scale(s, table, place, first, last);
    }
}

// Calls `use(token, row)` for rows `first` … `last` of all tokens, a warp for 32 rows of a token.
template <class Use> SQ_INLINE void for_results(int tokens, int first, int last, Use use) {
    const int blocks = (last - first + 31) / 32;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < tokens * blocks; i += WARPS) {
        const int block = i / tokens, row = first + block * 32 + (int)threadIdx.x % 32;
        if (row < last) use(i - block * tokens, row);
    }
}

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
