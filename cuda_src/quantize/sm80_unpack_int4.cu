// Packed int4 codes to int8 codes. A thread reads 8 bytes and writes 16.
#include "common/int4.cuh"

extern "C" __global__ void unpack_int4(
    const uint8* __restrict__ packed,  // 8 bytes for each thread
    uint8* __restrict__ codes,         // 16 bytes for each thread
    int64 threads) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    struct alignas(8) Words2 { uint32 word[2]; } in = ((const Words2*)packed)[i];
    Words4 out;
    unpack_int4x8(in.word[0], out.word[0], out.word[1]);
    unpack_int4x8(in.word[1], out.word[2], out.word[3]);
    ((Words4*)codes)[i] = out;
}
