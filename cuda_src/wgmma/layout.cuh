// Where things lie. Everything here also compiles for the host, for the tests.
#pragma once
#include "common/device.cuh"

// Rows of 128 bytes in shared memory, swizzled as the copy engine does it: 16-byte chunk c of row r lies at
// chunk c ^ (r % 8), so that eight rows of one chunk hit all banks. The first row is at a multiple of 1024.
SQ_INLINE uint32 swizzled(uint32 row, uint32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// How wgmma is told of such rows. `address` may be inside the first one, at a multiple of 32.
// Bits 0-13: the address / 16; bits 32-45: the distance of two groups of eight rows / 16; bit 62: this swizzle.
SQ_INLINE uint64 swizzled_rows(uint32 address) { return 1ull << 62 | 64ull << 32 | address >> 4; }

struct Tile {
    int m, n;
};

// n / d of numbers that are not negative, up to 2^22, by way of floats: a division of integers takes several hundred clocks.
SQ_INLINE int quotient(int n, int d) {
    const int q = (int)((float)n * (1.f / (float)d)), rest = n - q * d;
    return q + (rest >= d) - (rest < 0);
}

// Which tile of y is worked on as number `index`. What runs at the same time should share rows of x and of w
// while those are in L2: hence bands of `band` tiles of M, and M fastest inside a band.
SQ_INLINE Tile tile_at(int index, int tiles_m, int tiles_n, int band) {
    const int first = quotient(index, band * tiles_n) * band;
    const int rows = tiles_m - first < band ? tiles_m - first : band;
    const int inside = index - first * tiles_n;
    const int n = quotient(inside, rows);
    return {first + inside - n * rows, n};
}

struct Place {
    int row, column, columns;  // the first ones of a tile, and how many
};

// Where tile number `index` of `rows` × `columns` lies. Of the last `halves` tiles either half is a tile of its own;
// and of a tile with at most half of its columns in y, there is only that half. Without halves (-1) neither is so.
// A tile that begins at N or beyond is none.
SQ_INLINE Place place_at(int index, int tiles_m, int tiles_n, int band, int halves, int rows, int columns, int N) {
    const int first = halves < 0 ? tiles_m * tiles_n : tiles_m * tiles_n - halves;
    const int beyond = index < first ? 0 : index - first;
    const Tile tile = tile_at(index - beyond + beyond / 2, tiles_m, tiles_n, band);
    const bool half = halves >= 0 && (index >= first || tile.n * columns + columns / 2 >= N);
    return {tile.m * rows, tile.n * columns + beyond % 2 * (columns / 2), half ? columns / 2 : columns};
}
