// int4 codes as operands of int8 tensor cores.
#pragma once
#include "common/int4.cuh"

// Eight columns (one word) to int8 in column order, each code times 16: a code in the upper half of a byte is
// that already, sign and all. Three instructions instead of seven, and every product is exactly 16 times the
// product with the codes.
SQ_INLINE void unpack_int4x8_times16(uint32 packed, uint32& columns0to3, uint32& columns4to7) {
    const uint32 even = packed << 4 & 0xf0f0f0f0u, odd = packed & 0xf0f0f0f0u;
    columns0to3 = pick_bytes(even, odd, 0x5140);
    columns4to7 = pick_bytes(even, odd, 0x7362);
}
