// int4 codes, two per byte: column 2i in the low half, column 2i + 1 in the high half, two's
// complement. The layout of segquant_nb.formats.pack_int4, which is ONNX's.
//
// Everything here also compiles for the host, so that the tests can check it without a GPU.
#pragma once
#include "common/device.cuh"

// Bytes of the result picked out of the eight bytes of (high:low), one selector nibble each.
SQ_INLINE unsigned int pick_bytes(unsigned int low, unsigned int high, unsigned int selector) {
#ifdef __CUDACC__
    return __byte_perm(low, high, selector);
#else
    unsigned long long both = ((unsigned long long)high << 32) | low;
    unsigned int result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (unsigned int)((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
    return result;
#endif
}

// Four codes in the low halves of four bytes, sign-extended to int8.
// Each byte becomes (v ^ 8) - 8. The set top bit keeps a borrow from crossing into the next byte.
SQ_INLINE unsigned int sign_extend_int4x4(unsigned int halves) {
    return (((halves ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

// Eight columns (one 32-bit word) to eight int8 codes in column order, as int8 tensor cores read them.
SQ_INLINE void unpack_int4x8(unsigned int packed, unsigned int& columns0to3, unsigned int& columns4to7) {
    unsigned int even = sign_extend_int4x4(packed & 0x0f0f0f0fu);         // columns 0 2 4 6
    unsigned int odd = sign_extend_int4x4((packed >> 4) & 0x0f0f0f0fu);   // columns 1 3 5 7
    columns0to3 = pick_bytes(even, odd, 0x5140);
    columns4to7 = pick_bytes(even, odd, 0x7362);
}
