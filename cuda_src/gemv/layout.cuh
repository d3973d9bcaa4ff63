// Where the codes of a few rows lie, and the scales behind them, or else 16-bit floats: as the kernel that multiplies wants to find
// them in shared memory, for a weight that comes in pieces of 64 bytes of a row, 16 of them to a lane.
#pragma once
#include "common/device.cuh"

#if W_BITS == 4
#define LANE_COLUMNS 32
#else
#define LANE_COLUMNS 16
#endif
#define PIECE_COLUMNS (4 * LANE_COLUMNS)
#define VECTORS (LANE_COLUMNS / 16)  // of 16 codes that a lane has of a piece

// Where eight columns of codes lie: as the lanes read them, 16 bytes a lane, the tokens of a piece one after the other.
SQ_INLINE int code_place(int vector, int token, int tokens) {
    const int piece = vector / (8 * VECTORS), inside = vector % (8 * VECTORS);  // 2 * VECTORS of these to a lane
    const int lane = inside / (2 * VECTORS), part = inside / 2 % VECTORS;
    return ((piece * VECTORS + part) * tokens + token) * 64 + lane * 16 + inside % 2 * 8;
}

// The same of eight 16-bit floats.
SQ_INLINE int value_place(int vector, int token, int tokens) {
    const int vectors = LANE_COLUMNS / 8, piece = vector / (4 * vectors), inside = vector % (4 * vectors);
    return ((piece * vectors + inside % vectors) * tokens + token) * 64 + inside / vectors * 16;
}

// Bytes of the codes of all tokens; columns beyond the last one are multiplied with zeros.
SQ_INLINE int codes_bytes(int width, int tokens) { return (width + PIECE_COLUMNS - 1) / PIECE_COLUMNS * PIECE_COLUMNS * tokens; }
