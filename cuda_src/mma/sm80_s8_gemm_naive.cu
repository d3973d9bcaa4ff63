// What sm80_s8_gemm.cu computes, one thread for each element of y and nothing clever: to read first, and to
// compare with.
#include "common/numbers.cuh"

#define PATHS (DUAL ? 2 : 1)

extern "C" __global__ void s8_gemm_naive(
    const int8* __restrict__ x, const int8* __restrict__ w, float* __restrict__ y,
    const float* __restrict__ scale_x, int tokens, const float* __restrict__ scale_w, int scale_w_stride,
    const float* __restrict__ bias, int M, int N, int K, const int* __restrict__ ends) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= M || column >= N) return;
    float total = 0.f;
    for (int k = 0, segment = 0; k < K; ++segment) {
        int sum[2] = {0, 0};
        for (; k < ends[segment]; ++k) {
            int code = x[(int64)row * K + k];
            sum[DUAL && code < 0] += code * w[(int64)column * K + k];
        }
        for (int p = 0; p < PATHS; ++p) {
            float s = scale_x[(int64)(segment * PATHS + p) * tokens + (tokens > 1 ? row : 0)];
            float term = __fmul_rn(__int2float_rn(sum[p]), __fmul_rn(s, scale_w[(int64)segment * scale_w_stride + column]));
            total = __fadd_rn(total, term);
        }
    }
    y[(int64)row * N + column] = bias ? __fadd_rn(total, bias[column]) : total;
}
