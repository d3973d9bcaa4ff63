// y (M, N) = scale_x · scale_w · (x (M, K) · w (N, K)ᵀ) + t (M, R) · up (N, R)ᵀ + bias on Hopper: int8 codes with
// exact int32 sums, or 8-bit floats.
//
// One block per multiprocessor walks over tiles of y. One warpgroup of a block is the producer: a
// single thread that keeps the copy engine filling a ring of shared-memory stages. The other warpgroups
// are consumers: each multiplies 64 rows of the tile, then scales and stores them. At the end of a sum they take
// turns: while one scales, the next still multiplies.
//
// Fixed when compiled:
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   DUAL       the sign of a code of x selects its scale
//   SEGMENTED  0 one input segment, 2 two that have sums of their own, 1 any number
//   RESIDUAL   y = residual + gate · (the above)
//   FP8        codes are 8-bit floats (E4M3), sums are floats
//   LOW_RANK   t and up are 0 absent, 1 bfloat16, 2 float16
//   BN         columns of a tile: 64, 128, 160, 176, 192, 256
//   CONSUMERS  1 to 3 warpgroups: a tile has 64 rows for each
//   HALVES     the last tiles may be made in two halves of their columns
//   TURNS      stages at the end of a sum that the consumers multiply one after the other, or 0
//   STAGES     of the ring, each 128 columns of K
#include "tma/copy.cuh"
#include "wgmma/epilogue.cuh"
#include "wgmma/wgmma.cuh"

#define BM (64 * CONSUMERS)
#define BK 128
#define THREADS (128 * (CONSUMERS + 1))
#define PAIRED (SEGMENTED == 2)
#define FLOATS (SEGMENTED == 1 || LOW_RANK)  // sums become floats before all is summed
#define A_BYTES (BM * BK)
#define W_BOX (HALVES ? BN / 2 : BN)  // rows of w that one copy moves
#define STAGE_BYTES ((BM + BN) * BK)
#define PATHS (DUAL ? 2 : 1)
#if PAIRED
#define SECOND_SCALE(columns) columns.second
#else
#define SECOND_SCALE(columns) columns.scale
#endif
#define SLOTS (SEGMENTED == 1 ? 2 : 1)  // for what belongs to the columns of a tile
// The first stage does not add to what sums were, unless that takes a register too many.
#define STARTS !(RESIDUAL || DUAL && Sums > 80)
#define BOX_COLUMNS (OUTPUT == 2 ? 32 : 64)  // 128 bytes of y
#define BOX_GROUPS (BOX_COLUMNS / 8)
#define BOXES (CONSUMERS == 3 || BN == 192 ? 1 : 2)  // of a warp, on their way out

#if FP8
typedef float Sum;
template <int N> using Product = WgmmaE4m3<N>;
#else
typedef int Sum;
template <int N> using Product = Wgmma<N>;
#endif
#if LOW_RANK == 2
template <int N> using LowRankProduct = WgmmaHalf<N>;
#else
template <int N> using LowRankProduct = WgmmaBfloat16<N>;
#endif

// What two columns of y next to each other are scaled with, and what is added.
struct alignas(16) Columns {
    float2 scale, bias;
#if PAIRED
    float2 second;  // scale of the second segment
#endif
};

struct alignas(1024) Shared {
    uint8 stages[STAGES][STAGE_BYTES];  // BM rows of x, then BN rows of w
    uint8 boxes[CONSUMERS * 4][BOXES][16 * 128];
    Columns columns[SLOTS][BN / 2];
    uint64 full[STAGES], empty[STAGES], columns_full[SLOTS], columns_empty[SLOTS];
    uint64 passed[CONSUMERS][STAGES];  // by a consumer, to the one behind it
    Place places[STAGES];   // of the tile that begins with this stage
    uint64 placed[STAGES];  // said before the stage is full: what belongs to the rows is on its way meanwhile
};

struct Problem {
    int M, N, K;
    int tiles_m, tiles_n;  // of BM rows, of BN columns
    int tokens;            // M: scale_x has a value per row; 1: one for all rows
    int segments;
    int scale_w_stride;    // N, or 0: the same for all segments
    int rows_per_gate;     // rows that share a row of gate
    int band;              // see layout.cuh
    int rank_steps;        // of 16 columns of t and up
    int halves;            // how many tiles, the last ones, are two halves; with HALVES
};

SQ_INLINE Place place(const Problem& p, int index) {
    return place_at(index, p.tiles_m, p.tiles_n, p.band, HALVES ? p.halves : -1, BM, BN, p.N);
}

// The consumers' side of the ring.
struct Ring {
    Shared& shared;
    const int warpgroup;
    int stage, phase;
    int held;  // the stage that a group of wgmma in flight may still read, or -1

    SQ_INLINE const uint8* x() const { return shared.stages[stage]; }
    SQ_INLINE uint64 x_rows() const { return swizzled_rows(shared_address(x() + threadIdx.x / 128 * 64 * BK)); }
    SQ_INLINE uint64 w_rows() const { return swizzled_rows(shared_address(x() + A_BYTES)); }
    SQ_INLINE void wait() { barrier_wait(&shared.full[stage], phase); }
    // Of the tile that begins here. The shuffles tell the compiler that a warp takes one way at a branch.
    SQ_INLINE Place place() const {
        barrier_wait(&shared.placed[stage], phase);
        const Place& tile = shared.places[stage];
        return {__shfl_sync(~0u, tile.row, 0), __shfl_sync(~0u, tile.column, 0), __shfl_sync(~0u, tile.columns, 0)};
    }
    // Back to the producer, once nothing reads it any more. The consumer behind this one is told, too.
    SQ_INLINE void release_held() {
        if (held >= 0 && threadIdx.x % 32 == 0) {
            barrier_arrive(&shared.empty[held]);
            if (TURNS && warpgroup < CONSUMERS - 1) barrier_arrive(&shared.passed[warpgroup][held]);
        }
        held = -1;
    }
    // Until the consumer before this one works on the last of the next `count` stages.
    SQ_INLINE void wait_turn(int count) {
        const int at = stage + count - 2;
        if (TURNS && warpgroup > 0 && count > 1)
            barrier_wait(&shared.passed[warpgroup - 1][at % STAGES], phase ^ (at >= STAGES));
    }
    SQ_INLINE void next() {
        held = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// The consumers' side of `columns`, a ring: of each segment in turn, with SEGMENTED == 1.
struct ColumnRing {
    Shared& shared;
    int slot, phase;

    // The thread's first pair; the next one is four on.
    SQ_INLINE const Columns* wait() {
        barrier_wait(&shared.columns_full[slot], phase);
        return shared.columns[slot] + threadIdx.x % 4;
    }
    SQ_INLINE void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.columns_empty[slot]);
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};

template <int Sums> SQ_INLINE void clear(Sum (&sums)[Sums]) {
#pragma unroll
    for (int i = 0; i < Sums; ++i) sums[i] = 0;
}

// sums += x · wᵀ over a stage, four steps of 32 columns; the First stage of sums without what they were. One group of
// wgmma stays in flight.
template <bool First = false, int Sums> SQ_INLINE void multiply(Ring& ring, Sum (&sums)[Sums]) {
    const uint64 x = ring.x_rows(), w = ring.w_rows();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        if (First && step == 0) Product<2 * Sums>::start(sums, x, w);
        else Product<2 * Sums>::multiply(sums, x + 2 * step, w + 2 * step);
    wgmma_commit();
    wgmma_wait<1>();
    ring.release_held();
}

// The same over steps [from, to), for the ends of a segment. Nothing stays in flight.
template <int Sums> SQ_INLINE void multiply(Ring& ring, Sum (&sums)[Sums], int from, int to) {
    const uint64 x = ring.x_rows(), w = ring.w_rows();
#pragma unroll 1
    for (int step = from; step < to; ++step) {
        wgmma_fence();
        Product<2 * Sums>::multiply(sums, x + 2 * step, w + 2 * step);
    }
    wgmma_commit();
    wgmma_wait<0>();
    ring.release_held();
}

#if PAIRED
// The stage in which the second segment begins with step End.
template <int End, int Sums> SQ_INLINE void multiply_both(Ring& ring, Sum (&first)[Sums], Sum (&second)[Sums]) {
    const uint64 x = ring.x_rows(), w = ring.w_rows();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        if (step < End) Product<2 * Sums>::multiply(first, x + 2 * step, w + 2 * step);
        else if (step == End) Product<2 * Sums>::start(second, x + 2 * step, w + 2 * step);
        else Product<2 * Sums>::multiply(second, x + 2 * step, w + 2 * step);
    wgmma_commit();
    wgmma_wait<1>();
    ring.release_held();
}
#endif

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

// As multiply, for both signs, which share each read of w. The codes of a step are split while the one before runs.
template <bool First = false, int Sums>
SQ_INLINE void multiply_split(Ring& ring, Sum (&above)[Sums], Sum (&below)[Sums]) {
    const uint8* rows = ring.x() + threadIdx.x / 32 * 16 * BK;
    const uint64 w = ring.w_rows();
    uint32 x_above[2][4], x_below[2][4], codes[4];
    load_step(rows, 0, codes);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        split(codes, x_above[step % 2], x_below[step % 2]);
        if (step < 3) load_step(rows, step + 1, codes);
        wgmma_fence();
        if (First && step == 0) {
            Product<2 * Sums>::start(above, x_above[0], w);
            Product<2 * Sums>::start(below, x_below[0], w);
        } else {
            Product<2 * Sums>::multiply(above, x_above[step % 2], w + 2 * step);
            Product<2 * Sums>::multiply(below, x_below[step % 2], w + 2 * step);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step == 0) ring.release_held();
    }
}

template <int Sums>
SQ_INLINE void multiply_split(Ring& ring, Sum (&above)[Sums], Sum (&below)[Sums], int from, int to) {
    const uint8* rows = ring.x() + threadIdx.x / 32 * 16 * BK;
    const uint64 w = ring.w_rows();
    uint32 x_above[4], x_below[4], codes[4];
#pragma unroll 1
    for (int step = from; step < to; ++step) {
        load_step(rows, step, codes);
        split(codes, x_above, x_below);
        wgmma_fence();
        Product<2 * Sums>::multiply(above, x_above, w + 2 * step);
        Product<2 * Sums>::multiply(below, x_below, w + 2 * step);
        wgmma_commit();
        wgmma_wait<0>();
    }
    ring.release_held();
}

#if LOW_RANK
// total += t · upᵀ over a stage: 64 columns of 16 bits, of which the first steps are not only zeros.
template <int Sums> SQ_INLINE void multiply_low_rank(Ring& ring, float (&total)[Sums], int steps) {
    const uint64 t = ring.x_rows(), up = ring.w_rows();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        wgmma_fence();
        LowRankProduct<2 * Sums>::multiply(total, t + 2 * step, up + 2 * step);
    }
    wgmma_commit();
    wgmma_wait<0>();
    ring.release_held();
}
#endif

// A warpgroup's 64 rows of a tile: multiplied, scaled, sent out. The arguments are the kernel's.
template <int Width>
SQ_INLINE void make_tile(Ring& ring, ColumnRing& columns, int& box, const Place& tile, const TensorMap& y_map, const Problem& p,
                         const float* __restrict__ scale_x, const float* __restrict__ bias, const int* __restrict__ ends,
                         const int* __restrict__ duals, const float* __restrict__ gate,
                         const Output<OUTPUT>::Value* __restrict__ residual, const int* __restrict__ scale_rows) {
    constexpr int Sums = Width / 2;  // of a thread
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int first_row = tile.row + warp * 16, first_column = tile.column;
    int rows[2];  // what lies outside reads the last row, and is not stored
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = min(first_row + lane / 4 + 8 * h, p.M - 1);
    // Offsets have 32 bits: an address would take two registers, and none is left.
    auto load_scales = [&](int term, float (&scales)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            scales[h] = __ldg(scale_x + (uint32)(term * p.tokens + (p.tokens > 1 ? rows[h] : 0)));
    };

    Sum sums[Sums];          // of all codes, of those above zero, or of the first segment
    Sum second[Sums];        // of those below, with DUAL; of the second segment, with PAIRED
    float total[Sums] = {};  // of the segments so far, scaled; with FLOATS
    float x_scale[2], x_second[2];
    auto add_to_total = [&](bool two) {
        const Columns* pairs = columns.wait();
#pragma unroll
        for (int j = 0; j < Width / 8; ++j) {
            const Columns pair = pairs[4 * j];
            const float2 w = pair.scale, v = SECOND_SCALE(pair);
#pragma unroll
            for (int i = 4 * j; i < 4 * j + 4; ++i) {
                const float term = scaled_term(sums[i], x_scale[i / 2 % 2], i % 2 ? w.y : w.x);
                total[i] = SEGMENTED == 1 ? __fadd_rn(total[i], term) : term;
                if (two) total[i] = __fadd_rn(total[i], scaled_term(second[i], x_second[i / 2 % 2], i % 2 ? v.y : v.x));
            }
        }
    };

    // NOTE: each way leads through wait and pin. Where a group in flight met a path without one, the compiler would
    // give up and wait after every single product.
    auto settle = [&] {
        wgmma_wait<0>();
        pin(sums);
        if (DUAL || PAIRED) pin(second);
        ring.release_held();
    };
    auto multiply_stages = [&](Sum (&sums)[Sums], int count, bool dual) {
        if (dual)
#pragma unroll 1
            for (; count > 0; --count, ring.next()) {
                ring.wait();
                multiply_split(ring, sums, second);
            }
        else
#pragma unroll 1
            for (; count > 0; --count, ring.next()) {
                ring.wait();
                multiply(ring, sums);
            }
    };
    auto multiply_in_turns = [&](Sum (&sums)[Sums], int count, bool dual) {
        const int turn = min(count, TURNS);
        int run = count - turn;
#pragma unroll 1
        for (int i = TURNS ? 0 : 1; i < 2; ++i, run = turn) {
            multiply_stages(sums, run, dual);
            settle();
            if (i == 0) ring.wait_turn(turn);
        }
    };
    auto begin = [&](Sum (&sums)[Sums]) {
        ring.wait();
        if (DUAL) multiply_split<true>(ring, sums, second);
        else multiply<true>(ring, sums);
        ring.next();
    };
    const int blocks = (p.K + BK - 1) / BK;

    if (!SEGMENTED) {
        load_scales(0, x_scale);
        if (DUAL) load_scales(1, x_second);
        if (STARTS) begin(sums);
        else {
            clear(sums);
            clear(second);
            settle();
        }
        multiply_in_turns(sums, blocks - STARTS, DUAL);
        if (FLOATS) add_to_total(DUAL);
    } else if (PAIRED) {
        // Two sums: nothing happens where the first segment ends. Both have a stage at least.
        load_scales(0, x_scale);
        load_scales(1, x_second);
        const int end = __ldg(ends) / 32, whole = end / 4;
        begin(sums);
        multiply_stages(sums, whole - 1, false);
        ring.wait();
#if PAIRED
        if (end % 4 == 0) multiply<true>(ring, second);
        else if (end % 4 == 1) multiply_both<1>(ring, sums, second);
        else if (end % 4 == 2) multiply_both<2>(ring, sums, second);
        else multiply_both<3>(ring, sums, second);
#endif
        ring.next();
        multiply_in_turns(second, blocks - whole - 1, false);
        if (FLOATS) add_to_total(true);
    } else {
        for (int s = 0, step = 0; s < p.segments; ++s) {
            const int end = s == p.segments - 1 ? 4 * blocks : __ldg(ends + s) / 32;
            const bool dual = DUAL && (!duals || __ldg(duals + s));
            const int row = scale_rows ? __ldg(scale_rows + s) : s;
            load_scales(row * PATHS, x_scale);
            if (DUAL) load_scales(row * PATHS + 1, x_second);
            clear(sums);
            clear(second);
            // Up to a whole stage, whole stages, and what is left.
            auto part = [&] {
                const int from = step % 4, to = min(from + end - step, 4);
                if (from == 0) ring.wait();
                if (dual) multiply_split(ring, sums, second, from, to);
                else multiply(ring, sums, from, to);
                step += to - from;
                if (to == 4) ring.next();
            };
            settle();
            if (step % 4) part();
            settle();
            const int count = (end - step) / 4;
            multiply_in_turns(sums, count, dual);
            step += 4 * count;
            if (step < end) part();
            settle();
            add_to_total(dual);  // the boundary: sums become floats and start over
            if (s < p.segments - 1) columns.release();
        }
    }

#if LOW_RANK
    // t · upᵀ lands on the scaled sums, in the same registers.
    for (int left = p.rank_steps; left > 0; left -= 4, ring.next()) {
        ring.wait();
        multiply_low_rank(ring, total, min(left, 4));
    }
    pin(total);
    ring.release_held();
#endif

    // Scale, and send the tile out in boxes of 16 rows × 128 bytes, each warp on its own.
    typedef Output<OUTPUT> Out;
    const Columns* columns_of = columns.wait();
#pragma unroll
    for (int part = 0; part < (Width + BOX_COLUMNS - 1) / BOX_COLUMNS; ++part) {
        // Of 96 columns the second 64 begin at 32; what both boxes have is the same.
        const int from = min(part * BOX_COLUMNS, Width - BOX_COLUMNS);
        Out::Pair pairs[BOX_GROUPS][2];
#if RESIDUAL
        const int c = first_column + from + lane % 4 * 2, left = p.N - c;
#pragma unroll
        for (int j = 0; j < BOX_GROUPS; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                pairs[j][h] = load_pair<Out::Pair>(residual + ((uint32)rows[h] * p.N + c), 8 * j, left);
#endif
#pragma unroll
        for (int j = 0; j < BOX_GROUPS; ++j) {
            const int at = from + 8 * j;
            const Columns pair = columns_of[at / 2];
            const float2 w = pair.scale, v = SECOND_SCALE(pair), b = pair.bias;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float value[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int i = at / 2 + 2 * h + e;
                    value[e] = FLOATS ? total[i] : scaled_term(sums[i], x_scale[h], e ? w.y : w.x);
                    if ((DUAL || PAIRED) && !FLOATS)
                        value[e] = __fadd_rn(value[e], scaled_term(second[i], x_second[h], e ? v.y : v.x));
                    value[e] = __fadd_rn(value[e], e ? b.y : b.x);
                }
#if RESIDUAL
                const uint32 image = (uint32)(rows[h] / p.rows_per_gate) * p.N;
                const float2 by = gate ? load_pair<float2>(gate + (image + c), 8 * j, left) : float2{1.f, 1.f};
                value[0] = __fmaf_rn(by.x, value[0], Out::first(pairs[j][h]));
                value[1] = __fmaf_rn(by.y, value[1], Out::second(pairs[j][h]));
#endif
                pairs[j][h] = Out::pack(value[0], value[1]);
            }
        }
        uint8* out = ring.shared.boxes[warp][box];
        box = (box + 1) % BOXES;
        if (lane == 0) wait_stores<BOXES - 1>();
        __syncwarp();
        stage_box(shared_address(out), lane, pairs);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) store_box(&y_map, out, first_column + from, first_row);
    }
    columns.release();
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
    const Output<OUTPUT>::Value* __restrict__ residual,  // (M, N), as y
    const int* __restrict__ scale_rows        // (segments,) which scales each has; or null: its own
#if LOW_RANK
    , const __grid_constant__ TensorMap t_map,  // (M, R) 16-bit floats, boxes of BM rows × 64
    const __grid_constant__ TensorMap up_map    // (N, R), boxes of BN rows × 64
#endif
) {
    extern __shared__ __align__(1024) uint8 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    // The shuffle tells the compiler that a warp takes one way at a branch.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4, lane = threadIdx.x % 32;

    Place tile = {};
    if (warp == 0) {
        for (int s = lane; s < STAGES; s += 32) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.placed[s], 1);
            barrier_init(&shared.empty[s], CONSUMERS * 4);
            for (int c = 0; c < CONSUMERS; ++c) barrier_init(&shared.passed[c][s], 4);
        }
        for (int v = lane; v < SLOTS; v += 32) {
            barrier_init(&shared.columns_full[v], 1);
            barrier_init(&shared.columns_empty[v], CONSUMERS * 4);
        }
        barrier_init_fence();
    } else if (warpgroup == CONSUMERS) {
        // Meanwhile: a division takes some hundred clocks, and all wait for the first tile.
        tile = place(p, blockIdx.x);
        if (threadIdx.x == CONSUMERS * 128) {
            prefetch_map(&x_map);
            prefetch_map(&w_map);
            prefetch_map(&y_map);
        }
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        // Producers. Their registers go to the consumers; two warps stay.
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        const int tiles = p.tiles_m * p.tiles_n + p.halves;
        // NOTE: the whole warp goes through the loop, and one thread of it copies. Were the loop inside of the branch,
        // the compiler would take addresses for different ones in each thread, and loop over threads for each copy.
        if (warp == CONSUMERS * 4) {
            int stage = 0, phase = 0;
            for (int index = blockIdx.x; index < tiles; index += gridDim.x, tile = place(p, index)) {
                if (HALVES && tile.column >= p.N) continue;
                bool first = true;
                auto fill = [&](const TensorMap& a, const TensorMap& b, int column) {
                    const bool half = HALVES && tile.columns < BN;
                    barrier_wait(&shared.empty[stage], phase ^ 1);
                    if (lane == 0) {
                        if (first) shared.places[stage] = tile;
                        barrier_arrive(&shared.placed[stage]);
                        barrier_expect(&shared.full[stage], half ? STAGE_BYTES - W_BOX * BK : STAGE_BYTES);
                        load_box(&a, shared.stages[stage], &shared.full[stage], column, tile.row);
                        load_box(&b, shared.stages[stage] + A_BYTES, &shared.full[stage], column, tile.column);
                        if (HALVES && !half)
                            load_box(&b, shared.stages[stage] + A_BYTES + W_BOX * BK, &shared.full[stage], column,
                                     tile.column + W_BOX);
                    }
                    __syncwarp();
                    first = false;
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                };
#pragma unroll 1
                for (int column = 0; column < p.K; column += BK) fill(x_map, w_map, column);
#if LOW_RANK
#pragma unroll 1
                for (int step = 0; step < p.rank_steps; step += 4) fill(t_map, up_map, step * 16);
#endif
            }
            // A stage without a tile: it was the last one.
            barrier_wait(&shared.empty[stage], phase ^ 1);
            if (lane == 0) {
                shared.places[stage].columns = 0;
                barrier_arrive(&shared.placed[stage]);
            }
        } else if (warp == CONSUMERS * 4 + 1) {
            int slot = 0, phase = 0;
            for (int index = blockIdx.x; index < tiles; index += gridDim.x, tile = place(p, index)) {
                if (HALVES && tile.column >= p.N) continue;
#pragma unroll 1
                for (int s = 0; s < (SEGMENTED == 1 ? p.segments : 1); ++s) {
                    const float* scales = scale_w + (int64)(SEGMENTED == 1 && scale_rows ? __ldg(scale_rows + s) : s) * p.scale_w_stride;
                    barrier_wait(&shared.columns_empty[slot], phase ^ 1);
                    constexpr int at_once = SEGMENTED == 1 ? 1 : 2;  // as many as 24 registers hold
#pragma unroll(at_once)
                    for (int i = lane; i < tile.columns / 2; i += 32) {
                        const int column = tile.column + 2 * i, left = p.N - column;
                        Columns& to = shared.columns[slot][i];
                        to.scale = load_pair<float2>(scales + column, 0, left);
                        to.bias = bias ? load_pair<float2>(bias + column, 0, left) : float2();
#if PAIRED
                        to.second = load_pair<float2>(scales + p.scale_w_stride + column, 0, left);
#endif
                    }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&shared.columns_full[slot]);
                    if (++slot == SLOTS) slot = 0, phase ^= 1;
                }
            }
        }
    } else {
        // Consumers.
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        Ring ring = {shared, warpgroup, 0, 0, -1};
        ColumnRing columns = {shared, 0, 0};
        int box = 0;

        while (true) {
            const Place tile = ring.place();
            if (tile.columns == 0) break;
            if (HALVES && tile.columns < BN)
                make_tile<W_BOX>(ring, columns, box, tile, y_map, p, scale_x, bias, ends, duals, gate, residual, scale_rows);
            else
                make_tile<BN>(ring, columns, box, tile, y_map, p, scale_x, bias, ends, duals, gate, residual, scale_rows);
        }
        if (lane == 0) wait_stores<0>();
    }
}
