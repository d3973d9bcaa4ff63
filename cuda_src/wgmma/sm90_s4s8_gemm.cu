// y (M, N) = scale_x · scale_w · (x (M, K) · w (N, K)ᵀ) + bias on Hopper: int8 codes x, int4 codes w, exact int32 sums.
//
// The roles are swapped: yᵀ = w · xᵀ. wgmma reads its A from registers, and A is w: each thread unpacks its share of
// 64 rows (channels) itself. B is x, from shared memory. Otherwise as sm90_s8_gemm.cu: one block per multiprocessor walks
// over tiles of y, one warpgroup of it commands the copies, each of the others has 64 channels × TOKENS of the tile.
//
// Fixed when compiled:
//   OUTPUT     0 bfloat16, 1 float16, 2 float32
//   SEGMENTED  scales along K: 0 one, 1 of input segments, 2 of groups of columns of w, 3 of both
//   UNIT       columns of K that are multiplied without a look at scales: 128, 64, 32; all ends are multiples
//   WHOLE      each granule is a unit
//   LOW_RANK   1 bfloat16, 2 float16: t · upᵀ is added before the bias; 0: no
//   TOKENS     rows of x in a tile: a multiple of 16, at most 256
//   CONSUMERS  1 to 3 warpgroups: a tile has 64 channels for each
//   STAGES     of the ring, each 128 columns of K
#include "tma/block.cuh"
#include "wgmma/from_registers.cuh"
#include "wgmma/int4.cuh"
#include "wgmma/transposed.cuh"

#define BN (64 * CONSUMERS)
#define BK 128
#define THREADS (128 * (CONSUMERS + 1))
#define SUMS (TOKENS / 2)  // of a thread
#define ONCE_SCALED (SEGMENTED >= 2 ? 1.f : SQ_INT4_SCALE)  // scales of w, see wgmma/int4.cuh; sums of groups are as much too large
#define TABLE (!WHOLE || SEGMENTED == 3)  // are ends read?
#define STEPS (UNIT / 32)
#define UNITS (BK / UNIT)  // of a stage
#define X_BYTES (TOKENS * BK)
#define W_BYTES (64 * BK / 2)  // of a consumer
#define STAGE_BYTES (X_BYTES + CONSUMERS * W_BYTES)
#define BOX_TOKENS (TOKENS % 32 ? 16 : 32)
#define BOX_BYTES (BOX_TOKENS * (OUTPUT == 2 ? 256 : 128))  // 64 channels; of float32, two boxes of 32
#define BOXES 2  // of a warpgroup, on their way out
#define STORES (OUTPUT == 2 ? 2 : 1)  // of a box

struct alignas(1024) Shared {
    uint8 stages[STAGES][STAGE_BYTES];  // TOKENS rows of x, then w for each consumer
    uint8 boxes[CONSUMERS][BOXES][BOX_BYTES];
    float vectors[2][TOKENS];  // the tile's tokens of scale_x
    uint64 full[STAGES], empty[STAGES], vector_full[2], vector_empty[2];
};

struct Problem {
    int M, N, blocks;      // of BK columns
    int tiles_m, tiles_n;  // of TOKENS rows, of BN columns
    int tokens;            // M: scale_x has a value per row; 1: one for all rows
    int segments;          // of the input
    int granules;          // runs of columns with a scale_w of their own, inside a segment
    int scale_w_stride;    // N, or 0: the same for all
    int band;              // see layout.cuh
    int rank;              // columns of t and up, with LOW_RANK
    int units;             // of the columns of w
};

// The consumers' side of the ring.
struct Ring {
    Shared& shared;
    int stage, phase;
    int held;  // the stage that products in flight may still read, or -1

    SQ_INLINE uint64 x_rows() const { return swizzled_rows(shared_address(shared.stages[stage])); }
    // The thread's words of w, of two steps of 32 columns.
    SQ_INLINE const Words4& w(int half) const {
        const uint8* words = shared.stages[stage] + X_BYTES + threadIdx.x / 128 * W_BYTES;
        return reinterpret_cast<const Words4*>(words)[half * 128 + threadIdx.x % 128];
    }
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

// The consumers' side of `vectors`, a ring of two: scale_x for each segment in turn.
struct VectorRing {
    Shared& shared;
    int slot, phase;

    // The thread's first pair of tokens.
    SQ_INLINE const float* wait() {
        barrier_wait(&shared.vector_full[slot], phase);
        return shared.vectors[slot] + threadIdx.x % 4 * 2;
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

// What is unpacked stays before the fence: the compiler would unpack between the products, and fence and wait for each.
SQ_INLINE void keep(uint32 (&codes)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(codes[i]));
}

// sums += w · xᵀ over half a stage. In flight when this returns.
SQ_INLINE void multiply_half(int (&sums)[SUMS], const Words4& packed, uint32 (&codes)[2][4], uint64 x) {
    expand_int4(packed.word[0], packed.word[1], codes[0]);
    expand_int4(packed.word[2], packed.word[3], codes[1]);
    keep(codes[0]);
    keep(codes[1]);
    wgmma_fence();
    FromRegisters<TOKENS>::codes(sums, codes[0], x);
    FromRegisters<TOKENS>::codes(sums, codes[1], x + 2);
    wgmma_commit();
}

// The same over a whole stage. While the tensor cores work on one half, the codes of the next are unpacked.
SQ_INLINE void multiply(Ring& ring, int (&sums)[SUMS]) {
    ring.wait();
    const uint64 x = ring.x_rows();
    uint32 codes[2][2][4];
    multiply_half(sums, ring.w(0), codes[0], x);
    wgmma_wait<1>();
    ring.release_held();
    multiply_half(sums, ring.w(1), codes[1], x + 4);
    wgmma_wait<1>();
    ring.next();
}

#if SEGMENTED
// A thread's words of w for a unit.
struct Unit {
    uint32 word[2 * STEPS];

    SQ_INLINE void read(Ring& ring, int at) {
        if (at == 0) ring.wait();
        if (UNIT == 32) {
            struct alignas(8) Words2 { uint32 word[2]; };
            const Words2 two = *reinterpret_cast<const Words2*>(ring.w(at / 2).word + at % 2 * 2);
            word[0] = two.word[0], word[1] = two.word[1];
        } else
#pragma unroll
            for (int half = 0; half < UNIT / 64; ++half) {
                const Words4 four = ring.w(UNIT == 128 ? half : at);
#pragma unroll
                for (int i = 0; i < 4; ++i) word[4 * half + i] = four.word[i];
            }
    }
    SQ_INLINE void expand(uint32 (&codes)[STEPS][4]) const {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            expand_int4(word[2 * s], word[2 * s + 1], codes[s]);
            keep(codes[s]);
        }
    }
};

// sums += w · xᵀ over a unit, the first one of a granule without what sums were. In flight when this returns.
SQ_INLINE void multiply_unit(int (&sums)[SUMS], const uint32 (&codes)[STEPS][4], uint64 x, bool first) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) FromRegisters<TOKENS>::codes(sums, codes[s], x + 2 * s, s || !first);
    wgmma_commit();
}

// A scale of w, asked for here: were the load not volatile, the compiler would move it to where it is used.
SQ_INLINE float load_ahead(const float* from) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}
#endif

#if LOW_RANK
// Columns 32 block … of a thread's rows of up, as wgmma wants them; zero behind the last one.
SQ_INLINE void load_up(const uint16* up, const int (&channels)[2], int rank, int block, uint32 (&factors)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int column = 32 * block + 8 * (i / 2) + threadIdx.x % 4 * 2;
        uint32& to = factors[i / 4][i % 4];
        to = 0;
        // NOTE: volatile, so that it starts where it is written, before the wait for the sums.
        if (column < rank)
            asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(to) : "l"(up + (uint32)(channels[i % 2] * rank + column)));
    }
}

// values += up · tᵀ. A stage has 64 columns of t, twice what `factors` has of up.
SQ_INLINE void add_low_rank(Ring& ring, int (&values)[SUMS], uint32 (&factors)[2][4], const uint16* up, const int (&channels)[2], int rank) {
    const int blocks = (rank + 31) / 32;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        if (block % 2 == 0) ring.wait();
        const uint64 t = ring.x_rows() + block % 2 * 4;
        wgmma_fence();
        FromRegisters<TOKENS>::factors(values, factors[0], t);
        FromRegisters<TOKENS>::factors(values, factors[1], t + 2);
        wgmma_commit();
        wgmma_wait<0>();
        pin(values);
        if (block + 1 < blocks) load_up(up, channels, rank, block + 1, factors);
        if (block % 2 || block + 1 == blocks) {
            ring.next();
            ring.release_held();
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) s4s8_gemm_sm90(
    const __grid_constant__ TensorMap x_map,  // (M, K) codes, boxes of TOKENS rows × BK
    const __grid_constant__ TensorMap w_map,  // (N / 64, K / 32, 1024 bytes), blocks of CONSUMERS × 4, see int4.cuh
    const __grid_constant__ TensorMap y_map,  // (M, N), boxes of BOX_TOKENS rows × 128 bytes
    const __grid_constant__ Problem p,
    const float* __restrict__ scale_x,        // (segments, tokens)
    const float* __restrict__ scale_w,        // (granules or 1, N)
    const float* __restrict__ bias,           // (N,), or null
    const int* __restrict__ ends              // (granules,) twice the steps of 32 columns before its end, + 1: ends a segment
#if LOW_RANK
    , const __grid_constant__ TensorMap t_map,  // (M, rank) 16-bit factors, boxes of TOKENS rows × 128 bytes
    const uint16* __restrict__ up               // (N, rank)
#endif
) {
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
            barrier_init(&shared.vector_full[v], 32);
            barrier_init(&shared.vector_empty[v], CONSUMERS * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        // Producers. Their registers go to the consumers; two warps stay.
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (CONSUMERS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp == CONSUMERS * 4) {
            // NOTE: the whole warp goes through the loop, and one thread of it copies. Were the loop inside of the branch,
            // the compiler would take addresses for different ones in each thread, and loop over threads for each copy.
            if (lane == 0) {
                prefetch_map(&x_map);
                prefetch_map(&w_map);
                prefetch_map(&y_map);
            }
            int stage = 0, phase = 0;
            for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
                const Tile tile = tile_at(index, p.tiles_m, p.tiles_n, p.band);
#pragma unroll 1
                for (int block = 0; block < p.blocks; ++block) {
                    barrier_wait(&shared.empty[stage], phase ^ 1);
                    if (lane == 0) {
                        barrier_expect(&shared.full[stage], STAGE_BYTES);
                        load_box(&x_map, shared.stages[stage], &shared.full[stage], block * BK, tile.m * TOKENS);
                        load_block(&w_map, shared.stages[stage] + X_BYTES, &shared.full[stage], 0, 4 * block, tile.n * CONSUMERS);
                    }
                    __syncwarp();
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
#if LOW_RANK
                for (int column = 0; column < p.rank; column += 64) {
                    barrier_wait(&shared.empty[stage], phase ^ 1);
                    if (lane == 0) {
                        barrier_expect(&shared.full[stage], X_BYTES);
                        load_box(&t_map, shared.stages[stage], &shared.full[stage], column, tile.m * TOKENS);
                    }
                    __syncwarp();
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
#endif
            }
        } else if (warp == CONSUMERS * 4 + 1) {
            // Not the copy engine: rows of scale_x start wherever M puts them.
            int slot = 0, phase = 0;
            for (int index = blockIdx.x; index < p.tiles_m * p.tiles_n; index += gridDim.x) {
                const int first = tile_at(index, p.tiles_m, p.tiles_n, p.band).m * TOKENS;
                for (int s = 0; s < p.segments; ++s, phase ^= slot, slot ^= 1) {
                    barrier_wait(&shared.vector_empty[slot], phase ^ 1);
#pragma unroll
                    for (int i = lane; i < TOKENS; i += 32)
                        shared.vectors[slot][i] = __ldg(scale_x + (int64)s * p.tokens + (p.tokens > 1 ? min(first + i, p.M - 1) : 0));
                    barrier_arrive(&shared.vector_full[slot]);
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
            const int first_token = tile.m * TOKENS, first_channel = tile.n * BN + warpgroup * 64;
            int channels[2];  // what lies outside reads the last one, and is not stored
            float w_scale[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) channels[h] = min(first_channel + warp % 4 * 16 + lane / 4 + 8 * h, p.N - 1);

            int sums[SUMS];
            float total[SUMS] = {};  // of the scales so far; with SEGMENTED
#if LOW_RANK
            uint32 factors[2][4];
#endif

#if !SEGMENTED
            clear(sums);
#pragma unroll
            for (int h = 0; h < 2; ++h) w_scale[h] = __ldg(scale_w + channels[h]) * SQ_INT4_SCALE;
#pragma unroll 1
            for (int block = 0; block < p.blocks; ++block) multiply(ring, sums);
#if LOW_RANK
            load_up(up, channels, p.rank, 0, factors);
#endif
            wgmma_wait<0>();
            pin(sums);
            ring.release_held();
#else
            float within[SUMS] = {};  // of the groups of a segment so far; with SEGMENTED == 3
            // What is known of a granule before its sums are: where it ends, and its scales.
            int granule = 0, end = TABLE ? __ldg(ends) : 0, next_end = 0, at = 0;
            bool first = true;
            float next_scale[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) w_scale[h] = __ldg(scale_w + channels[h]) * ONCE_SCALED;
            auto look_ahead = [&] {
                const int next = min(granule + 1, p.granules - 1);
                if (TABLE) next_end = __ldg(ends + next);
#pragma unroll
                for (int h = 0; h < 2; ++h) next_scale[h] = load_ahead(scale_w + (uint32)(next * p.scale_w_stride + channels[h]));
            };
            // The boundary: sums become floats and start over.
            auto scale_sums = [&] {
                const bool ends_segment = SEGMENTED == 1 || SEGMENTED == 3 && end % 2;
                const float* x_scales = ends_segment ? vectors.wait() : nullptr;
#pragma unroll
                for (int j = 0; j < TOKENS / 8; ++j) {
                    const float2 x = SEGMENTED == 1 ? pair_at(x_scales + 8 * j) : float2();
#pragma unroll
                    for (int i = 4 * j; i < 4 * j + 4; ++i) {
                        float& to = SEGMENTED == 3 ? within[i] : total[i];
                        if (SEGMENTED == 1) to = __fadd_rn(to, scaled_term(sums[i], i % 2 ? x.y : x.x, w_scale[i / 2 % 2]));
                        else to = fmaf(__int2float_rn(sums[i]), w_scale[i / 2 % 2], to);
                    }
                }
                if (SEGMENTED == 3 && ends_segment)
#pragma unroll
                    for (int j = 0; j < TOKENS / 8; ++j) {
                        const float2 x = pair_at(x_scales + 8 * j);
#pragma unroll
                        for (int i = 4 * j; i < 4 * j + 4; ++i) {
                            total[i] = __fadd_rn(total[i], __fmul_rn(within[i] * SQ_INT4_SCALE, i % 2 ? x.y : x.x));
                            within[i] = 0.f;
                        }
                    }
                if (ends_segment) vectors.release();
            };
            auto next_granule = [&] {
                ++granule;
                end = next_end;
#pragma unroll
                for (int h = 0; h < 2; ++h) w_scale[h] = next_scale[h] * ONCE_SCALED;
            };
            auto ends_at = [&](int unit) { return WHOLE || unit + 1 == p.units || (unit + 1) * (2 * STEPS) == (end & ~1); };
            Unit packed;
            packed.read(ring, at);
#pragma unroll 1
            for (int unit = 0; unit < p.units; ++unit) {
                uint32 codes[STEPS][4];
                packed.expand(codes);
                multiply_unit(sums, codes, ring.x_rows() + at * (2 * STEPS), first);
                if (first) look_ahead();
                const bool last = unit + 1 == p.units;
                if (++at == UNITS || last) ring.next(), at = 0;
                if (!last) packed.read(ring, at);
                wgmma_wait<0>();
                pin(sums);
                ring.release_held();
                first = ends_at(unit);
                if (first) {
                    scale_sums();
                    next_granule();
                }
            }
#endif

            // Scale, and send the tile out in boxes of BOX_TOKENS × 64 channels, each warpgroup on its own.
            typedef Output<OUTPUT> Out;
            float biases[2] = {};
            if (bias)
#pragma unroll
                for (int h = 0; h < 2; ++h) biases[h] = __ldg(bias + channels[h]);
            const float* x_scales = SEGMENTED % 2 ? nullptr : vectors.wait();
            auto value_of = [&](int i, float x) {
                if (SEGMENTED % 2) return total[i];
                return SEGMENTED ? __fmul_rn(total[i] * SQ_INT4_SCALE, x) : scaled_term(sums[i], x, w_scale[i / 2 % 2]);
            };
#if LOW_RANK
            if (SEGMENTED) load_up(up, channels, p.rank, 0, factors);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
                const float2 x = SEGMENTED % 2 ? float2() : pair_at(x_scales + 8 * j);
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; ++i)
                    sums[i] = __float_as_int(value_of(i, i % 2 ? x.y : x.x));
            }
            add_low_rank(ring, sums, factors, up, channels, p.rank);
#endif
#pragma unroll
            for (int part = 0; part < TOKENS / BOX_TOKENS; ++part) {
                uint8* out = shared.boxes[warpgroup][box];
                box = (box + 1) % BOXES;
                if (threadIdx.x % 128 == 0) wait_stores<(BOXES - 1) * STORES>();
                meet_warpgroup(warpgroup);
#pragma unroll
                for (int pair = 0; pair < BOX_TOKENS / 16; ++pair) {
                    const int at = part * BOX_TOKENS + pair * 16;
                    Out::Pair pairs[2][2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float2 x = SEGMENTED % 2 || LOW_RANK ? float2() : pair_at(x_scales + at + 8 * j);
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int i = at / 2 + 4 * j + 2 * h;
                            float value[2];
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                value[e] = LOW_RANK ? __int_as_float(sums[i + e]) : value_of(i + e, e ? x.y : x.x);
                                value[e] = __fadd_rn(value[e], biases[h]);
                            }
                            pairs[j][h] = Out::pack(value[0], value[1]);
                        }
                    }
                    stage_turned<BOX_TOKENS>(shared_address(out) + pair * 16 * 128, warp % 4, lane, pairs);
                }
                fence_async_proxy();
                meet_warpgroup(warpgroup);
                if (threadIdx.x % 128 == 0 && first_channel < p.N) {
                    store_box(&y_map, out, first_channel, first_token + part * BOX_TOKENS);
                    if (OUTPUT == 2) store_box(&y_map, out + BOX_TOKENS * 128, first_channel + 32, first_token + part * BOX_TOKENS);
                }
            }
            if (SEGMENTED % 2 == 0) vectors.release();
        }
        if (threadIdx.x % 128 == 0) wait_stores<0>();
    }
}
