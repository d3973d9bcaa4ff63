// y (M, N) = scale_x · scale_w · (x (M, K) · w (N, K)ᵀ) + bias on Hopper: int8 codes, exact int32 sums.
//
// One block per multiprocessor walks over tiles of y. One warpgroup of a block is the producer: a
// single thread that keeps the copy engine filling a ring of shared-memory stages. The other warpgroups
// are consumers: each multiplies 64 rows of the tile, then scales and stores them.
//
// Fixed when compiled:
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   DUAL       the sign of a code of x selects its scale
//   SEGMENTED  more than one input segment
//   RESIDUAL   y = residual + gate · (the above)
//   BN         columns of a tile: 64, 128, 192, 256
//   CONSUMERS  1 to 3 warpgroups: a tile has 64 rows for each
//   STAGES     of the ring, each 128 columns of K
#include "tma/copy.cuh"
#include "wgmma/epilogue.cuh"
#include "wgmma/wgmma.cuh"

#define BM (64 * CONSUMERS)
#define BK 128
#define THREADS (128 * (CONSUMERS + 1))
#define SUMS (BN / 2)  // of a thread
#define A_BYTES (BM * BK)
#define STAGE_BYTES ((BM + BN) * BK)
#define PATHS (DUAL ? 2 : 1)
#define BOX_COLUMNS (OUTPUT == 2 ? 32 : 64)  // 128 bytes of y
#define BOX_GROUPS (BOX_COLUMNS / 8)
#define BOXES (CONSUMERS == 3 ? 1 : 2)  // of a warp, on their way out
#define SPLITS (BN == 192 ? 1 : 2)  // sets of registers for codes split by sign: what is left beside the sums

struct alignas(1024) Shared {
    uint8 stages[STAGES][STAGE_BYTES];  // BM rows of x, then BN rows of w
    uint8 boxes[CONSUMERS * 4][BOXES][16 * 128];
    float vectors[2][BN];  // the tile's columns of scale_w and bias
    uint64 full[STAGES], empty[STAGES], vector_full[2], vector_empty[2];
};

struct Problem {
    int M, N, blocks;      // of BK columns
    int tiles_m, tiles_n;  // of BM rows, of BN columns
    int tokens;            // M: scale_x has a value per row; 1: one for all rows
    int segments;
    int scale_w_stride;    // N, or 0: the same for all segments
    int rows_per_gate;     // rows that share a row of gate
    int band;              // see layout.cuh
};

// The consumers' side of the ring.
struct Ring {
    Shared& shared;
    int stage, phase;
    int held;  // the stage that a group of wgmma in flight may still read, or -1

    SQ_INLINE const uint8* x() const { return shared.stages[stage]; }
    SQ_INLINE uint64 x_rows() const { return swizzled_rows(shared_address(x() + threadIdx.x / 128 * 64 * BK)); }
    SQ_INLINE uint64 w_rows() const { return swizzled_rows(shared_address(x() + A_BYTES)); }
    SQ_INLINE void wait() { barrier_wait(&shared.full[stage], phase); }
    // Back to the producer, once nothing reads it any more.
    SQ_INLINE void release_held() {
        if (held >= 0 && threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[held]);
        held = -1;
    }
    SQ_INLINE void next() {
        held = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// The consumers' side of `vectors`, a ring of two: scale_w for each segment in turn, then the bias.
struct VectorRing {
    Shared& shared;
    int slot, phase;

    // The thread's first pair of columns in the next vector, or in the one behind it.
    SQ_INLINE const float* wait(int ahead = 0) {
        barrier_wait(&shared.vector_full[slot ^ ahead], phase ^ (slot & ahead));
        return shared.vectors[slot ^ ahead] + threadIdx.x % 4 * 2;
    }
    SQ_INLINE void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.vector_empty[slot]);
        phase ^= slot;
        slot ^= 1;
    }
};

SQ_INLINE void clear(int (&sums)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] = 0;
}

// sums += x · wᵀ over a stage, four steps of 32 columns. One group of wgmma stays in flight.
SQ_INLINE void multiply(Ring& ring, int (&sums)[SUMS]) {
    const uint64 x = ring.x_rows(), w = ring.w_rows();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) Wgmma<BN>::multiply(sums, x + 2 * step, w + 2 * step);
    wgmma_commit();
    wgmma_wait<1>();
    ring.release_held();
}

// The same over steps [from, to), for the ends of a segment. Nothing stays in flight.
SQ_INLINE void multiply(Ring& ring, int (&sums)[SUMS], int from, int to) {
    const uint64 x = ring.x_rows(), w = ring.w_rows();
#pragma unroll 1
    for (int step = from; step < to; ++step) {
        wgmma_fence();
        Wgmma<BN>::multiply(sums, x + 2 * step, w + 2 * step);
        wgmma_commit();
        wgmma_wait<0>();
    }
    ring.release_held();
}

// One step of a warp's 16 rows of x in registers.
SQ_INLINE void load_step(const uint8* rows, int step, uint32 (&codes)[4]) {
    const uint32 lane = threadIdx.x % 32;
    load_fragments(codes, rows + swizzled(lane % 16, 2 * step + lane / 16));
}

// The two signs of four codes apart.
SQ_INLINE void split(const uint32 (&codes)[4], uint32 (&above)[4], uint32 (&below)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        below[i] = codes[i] & negative_bytes(codes[i]);
        above[i] = codes[i] ^ below[i];
    }
}

// As multiply, for both signs, which share each read of w. The codes of a step load while the one before runs.
SQ_INLINE void multiply_split(Ring& ring, int (&above)[SUMS], int (&below)[SUMS]) {
    const uint8* rows = ring.x() + threadIdx.x / 32 * 16 * BK;
    const uint64 w = ring.w_rows();
    uint32 x_above[SPLITS][4], x_below[SPLITS][4], codes[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        load_step(rows, step, codes);
        if (SPLITS == 1) wgmma_wait<0>();
        split(codes, x_above[step % SPLITS], x_below[step % SPLITS]);
        wgmma_fence();
        Wgmma<BN>::multiply(above, x_above[step % SPLITS], w + 2 * step);
        Wgmma<BN>::multiply(below, x_below[step % SPLITS], w + 2 * step);
        wgmma_commit();
        if (SPLITS == 2) wgmma_wait<1>();
        if (step == 0) ring.release_held();
    }
}

SQ_INLINE void multiply_split(Ring& ring, int (&above)[SUMS], int (&below)[SUMS], int from, int to) {
    const uint8* rows = ring.x() + threadIdx.x / 32 * 16 * BK;
    const uint64 w = ring.w_rows();
    uint32 x_above[4], x_below[4], codes[4];
#pragma unroll 1
    for (int step = from; step < to; ++step) {
        load_step(rows, step, codes);
        split(codes, x_above, x_below);
        wgmma_fence();
        Wgmma<BN>::multiply(above, x_above, w + 2 * step);
        Wgmma<BN>::multiply(below, x_below, w + 2 * step);
        wgmma_commit();
        wgmma_wait<0>();
    }
    ring.release_held();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) s8_gemm_sm90(
    const __grid_constant__ TensorMap x_map,  // (M, K) codes, boxes of BM rows × BK
    const __grid_constant__ TensorMap w_map,  // (N, K) codes, boxes of BN rows × BK
    const __grid_constant__ TensorMap y_map,  // (M, N), boxes of 16 rows × BOX_COLUMNS
    const __grid_constant__ Problem p,
    const float* __restrict__ scale_x,        // (segments * PATHS, tokens)
    const float* __restrict__ scale_w,        // (segments or 1, N)
    const float* __restrict__ bias,           // (N,), or null
    const int* __restrict__ ends,             // (segments,) one past the last column of each, multiples of 32
    const int* __restrict__ duals,            // (segments,) 1 where the sign matters; or null: everywhere
    const float* __restrict__ gate,           // (M / rows_per_gate, N)
    const Output<OUTPUT>::Value* __restrict__ residual) {  // (M, N), as y
    extern __shared__ __align__(1024) uint8 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp takes one way at a branch.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], CONSUMERS * 4);
        }
        for (int v = 0; v < 2; ++v) {
            barrier_init(&shared.vector_full[v], 1);
            barrier_init(&shared.vector_empty[v], CONSUMERS * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        // Producers. Their registers go to the consumers; two threads stay.
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x == CONSUMERS * 128) {
            prefetch_map(&x_map);
            prefetch_map(&w_map);
            prefetch_map(&y_map);
            int stage = 0, phase = 0;
            for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
                const Tile tile = tile_at(index, p.tiles_m, p.tiles_n, p.band);
#pragma unroll 1
                for (int block = 0; block < p.blocks; ++block) {
                    barrier_wait(&shared.empty[stage], phase ^ 1);
                    barrier_expect(&shared.full[stage], STAGE_BYTES);
                    load_box(&x_map, shared.stages[stage], &shared.full[stage], block * BK, tile.m * BM);
                    load_box(&w_map, shared.stages[stage] + A_BYTES, &shared.full[stage], block * BK, tile.n * BN);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        } else if (threadIdx.x == CONSUMERS * 128 + 32) {
            int slot = 0, phase = 0;
            for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
                const int first = tile_at(index, p.tiles_m, p.tiles_n, p.band).n * BN;
                const uint32 bytes = min(BN, p.N - first) * 4;
                for (int s = 0; s < p.segments + (bias != nullptr); ++s, phase ^= slot, slot ^= 1) {
                    const float* from = s < p.segments ? scale_w + (int64)s * p.scale_w_stride : bias;
                    barrier_wait(&shared.vector_empty[slot], phase ^ 1);
                    barrier_expect(&shared.vector_full[slot], bytes);
                    load_bytes(from + first, shared.vectors[slot], &shared.vector_full[slot], bytes);
                }
            }
        }
    } else {
        // Consumers.
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
        Ring ring = {shared, 0, 0, -1};
        VectorRing vectors = {shared, 0, 0};
        int box = 0;

        for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
            const Tile tile = tile_at(index, p.tiles_m, p.tiles_n, p.band);
            const int first_row = tile.m * BM + warp * 16, first_column = tile.n * BN;
            int rows[2];  // what lies outside reads the last row, and is not stored
#pragma unroll
            for (int h = 0; h < 2; ++h) rows[h] = min(first_row + lane / 4 + 8 * h, p.M - 1);
            // Offsets have 32 bits: an address would take two registers, and none is left.
            auto load_scales = [&](int term, float (&scales)[2]) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    scales[h] = __ldg(scale_x + (uint32)(term * p.tokens + (p.tokens > 1 ? rows[h] : 0)));
            };

            int sums[SUMS];          // of all codes, or of those above zero
            int below[SUMS];         // of those below, with DUAL
            float total[SUMS] = {};  // of the segments so far, scaled; with SEGMENTED
            float x_scale[2], x_below[2];

            if (!SEGMENTED) {
                load_scales(0, x_scale);
                if (DUAL) load_scales(1, x_below);
                clear(sums);
                clear(below);
                for (int block = 0; block < p.blocks; ++block, ring.next()) {
                    ring.wait();
                    if (DUAL) multiply_split(ring, sums, below);
                    else multiply(ring, sums);
                }
                wgmma_wait<0>();
                pin(sums);
                if (DUAL) pin(below);
                ring.release_held();
            } else {
                for (int s = 0, step = 0; s < p.segments; ++s) {
                    const int end = s == p.segments - 1 ? 4 * p.blocks : __ldg(ends + s) / 32;
                    const bool dual = DUAL && (!duals || __ldg(duals + s));
                    load_scales(s * PATHS, x_scale);
                    if (DUAL) load_scales(s * PATHS + 1, x_below);
                    clear(sums);
                    clear(below);
                    // Up to a whole stage, whole stages, and what is left.
                    auto part = [&] {
                        const int from = step % 4, to = min(from + end - step, 4);
                        if (from == 0) ring.wait();
                        if (dual) multiply_split(ring, sums, below, from, to);
                        else multiply(ring, sums, from, to);
                        step += to - from;
                        if (to == 4) ring.next();
                    };
                    // NOTE: each way leads through wait and pin. Where a group in flight met a path without one, the
                    // compiler would give up and wait after every single product.
                    auto settle = [&] {
                        wgmma_wait<0>();
                        pin(sums);
                        if (DUAL) pin(below);
                    };
                    settle();
                    if (step % 4) part();
                    settle();
                    if (dual)
                        for (; step + 4 <= end; step += 4, ring.next()) {
                            ring.wait();
                            multiply_split(ring, sums, below);
                        }
                    else
                        for (; step + 4 <= end; step += 4, ring.next()) {
                            ring.wait();
                            multiply(ring, sums);
                        }
                    settle();
                    if (step < end) part();
                    settle();
                    ring.release_held();
                    // The boundary: sums become floats and start over.
                    const float* w_scales = vectors.wait();
#pragma unroll
                    for (int j = 0; j < BN / 8; ++j) {
                        const float2 w = pair_at(w_scales + 8 * j);
#pragma unroll
                        for (int i = 4 * j; i < 4 * j + 4; ++i) {
                            const float w_scale = i % 2 ? w.y : w.x;
                            total[i] = __fadd_rn(total[i], scaled_term(sums[i], x_scale[i / 2 % 2], w_scale));
                            if (dual) total[i] = __fadd_rn(total[i], scaled_term(below[i], x_below[i / 2 % 2], w_scale));
                        }
                    }
                    vectors.release();
                }
            }

            // Scale, and send the tile out in boxes of 16 rows × 128 bytes, each warp on its own.
            typedef Output<OUTPUT> Out;
            const float* w_scales = SEGMENTED ? nullptr : vectors.wait();
            const float* biases = bias ? vectors.wait(!SEGMENTED) : nullptr;
#pragma unroll
            for (int part = 0; part < BN / BOX_COLUMNS; ++part) {
                Out::Pair pairs[BOX_GROUPS][2];
#if RESIDUAL
                const int c = first_column + part * BOX_COLUMNS + lane % 4 * 2, left = p.N - c;
#pragma unroll
                for (int j = 0; j < BOX_GROUPS; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        pairs[j][h] = load_pair<Out::Pair>(residual + ((uint32)rows[h] * p.N + c), 8 * j, left);
#endif
#pragma unroll
                for (int j = 0; j < BOX_GROUPS; ++j) {
                    const int at = part * BOX_COLUMNS + 8 * j;
                    const float2 w = SEGMENTED ? float2() : pair_at(w_scales + at);
                    const float2 b = bias ? pair_at(biases + at) : float2();
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float value[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int i = at / 2 + 2 * h + e;
                            const float w_scale = e ? w.y : w.x;
                            value[e] = SEGMENTED ? total[i] : scaled_term(sums[i], x_scale[h], w_scale);
                            if (DUAL && !SEGMENTED) value[e] = __fadd_rn(value[e], scaled_term(below[i], x_below[h], w_scale));
                            value[e] = __fadd_rn(value[e], e ? b.y : b.x);
                        }
#if RESIDUAL
                        const float2 by = load_pair<float2>(gate + ((uint32)(rows[h] / p.rows_per_gate) * p.N + c), 8 * j, left);
                        value[0] = __fmaf_rn(by.x, value[0], Out::first(pairs[j][h]));
                        value[1] = __fmaf_rn(by.y, value[1], Out::second(pairs[j][h]));
#endif
                        pairs[j][h] = Out::pack(value[0], value[1]);
                    }
                }
                uint8* out = shared.boxes[warp][box];
                box = (box + 1) % BOXES;
                if (lane == 0) wait_stores<BOXES - 1>();
                __syncwarp();
                stage_box(shared_address(out), lane, pairs);
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) store_box(&y_map, out, first_column + part * BOX_COLUMNS, first_row);
            }
            if (!SEGMENTED) vectors.release();
            if (bias) vectors.release();
        }
        if (lane == 0) wait_stores<0>();
    }
}
