// A GPU on the host, slow and suspicious. The sources of cuda_src are compiled against this header by
// an ordinary C++ compiler and run as they are: blocks one after the other, the threads of a block as
// fibers that take turns at barriers and warp operations.
//
// It is stricter than the hardware. Threads take turns in an order drawn from a seed, so that a missing
// barrier shows. An asynchronous copy lands as late as the program allows, or (`early_copies`) as soon
// as it can: a missing wait shows in the first mode, a buffer refilled too early in the second. Shared
// memory starts as garbage. A barrier or warp operation that not all threads reach is an error.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SQ_SHARED(name) unsigned char* name = emulate::shared_memory()

struct uint3 { unsigned x, y, z; };

namespace emulate {

struct Copy { void* to; const void* from; int valid; };

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool begun, done;
    uint3 thread;
    int warp, lane;
    const unsigned* counter;  // waits until this is no longer `seen`
    unsigned seen;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    const char* operation;
    int arrived;
    unsigned generation;
    unsigned char in[32][64], out[32][64];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char*> stacks;
    std::vector<unsigned char> shared;
    size_t shared_bytes = 0;
    uint3 block, block_dim, grid_dim;
    int arrived = 0, alive = 0;
    unsigned generation = 0;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    char error[256] = "";
    bool early_copies = false;
    uint64_t random = 1;
    void (*body)(void*) = nullptr;
    void* closure = nullptr;
};

inline Machine machine;
constexpr size_t STACK = 128 * 1024;

inline unsigned draw(unsigned n) {
    machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned((machine.random >> 33) % n);
}

[[noreturn]] inline void fail(const char* what) {
    if (!machine.error[0]) {
        const uint3 b = machine.block, t = machine.current->thread;
        snprintf(machine.error, sizeof machine.error, "%s, in block (%u, %u, %u), thread (%u, %u, %u)", what, b.x, b.y, b.z,
                 t.x, t.y, t.z);
    }
    _longjmp(machine.scheduler, 2);
}

inline void wait_for(const unsigned& counter, unsigned seen) {
    Fiber* self = machine.current;
    self->counter = &counter;
    self->seen = seen;
    if (!_setjmp(self->at)) _longjmp(machine.scheduler, 1);
}

inline unsigned char* shared_memory() { return machine.shared.data() + (-(uintptr_t)machine.shared.data() & 127); }

inline void barrier() {
    unsigned seen = machine.generation;
    if (++machine.arrived == machine.alive) {
        machine.arrived = 0;
        ++machine.generation;
    } else wait_for(machine.generation, seen);
}

// All 32 lanes bring an operand; the last one computes what every lane receives.
template <class In, class Out, class Compute> Out together(const char* operation, const In& in, Compute compute) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "operands of a warp operation");
    Fiber* self = machine.current;
    Warp& warp = machine.warps[self->warp];
    if (!warp.arrived) warp.operation = operation;
    if (strcmp(warp.operation, operation)) fail("the lanes of a warp are at different operations");
    memcpy(warp.in[self->lane], &in, sizeof(In));
    unsigned seen = warp.generation;
    if (++warp.arrived == 32) {
        In ins[32];
        Out outs[32];
        for (int i = 0; i < 32; ++i) memcpy(&ins[i], warp.in[i], sizeof(In));
        compute(ins, outs);
        for (int i = 0; i < 32; ++i) memcpy(warp.out[i], &outs[i], sizeof(Out));
        warp.arrived = 0;
        ++warp.generation;
    } else wait_for(warp.generation, seen);
    Out out;
    memcpy(&out, warp.out[self->lane], sizeof(Out));
    return out;
}

inline void land(const Copy& copy) {
    unsigned char bytes[16] = {};
    memcpy(bytes, copy.from, copy.valid);
    memcpy(copy.to, bytes, 16);
}

inline void land_all_but(int pending) {
    auto& groups = machine.current->groups;
    while ((int)groups.size() > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

inline void fiber_main() {
    machine.body(machine.closure);
    Fiber* self = machine.current;
    self->done = true;
    _longjmp(machine.scheduler, 1);
}

inline bool step(Fiber& fiber) {  // let one fiber run until it waits; false: an error
    machine.current = &fiber;
    switch (_setjmp(machine.scheduler)) {
        case 0:
            if (fiber.begun) _longjmp(fiber.at, 1);
            fiber.begun = true;
            setcontext(&fiber.context);
        case 2: return false;
    }
    return true;
}

inline bool ended(Fiber& fiber, int& left) {
    --left;
    for (const auto& group : fiber.groups)
        if (!group.empty()) {
            snprintf(machine.error, sizeof machine.error, "a thread ended before its copies landed");
            return false;
        }
    return true;
}

inline bool run_block() {
    const uint3 d = machine.block_dim;
    const int threads = d.x * d.y * d.z;
    machine.shared.assign(machine.shared_bytes + 128, 0);
    for (auto& byte : machine.shared) byte = (unsigned char)draw(256);
    machine.warps.assign((threads + 31) / 32, Warp{});
    machine.fibers.assign(threads, Fiber{});
    while ((int)machine.stacks.size() < threads) machine.stacks.push_back((unsigned char*)malloc(STACK));
    machine.arrived = 0;
    machine.alive = threads;
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& f = machine.fibers[i];
        f.thread = {i % d.x, i / d.x % d.y, i / d.x / d.y};
        f.warp = i / 32;
        f.lane = i % 32;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = machine.stacks[i];
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
        order[i] = i;
    }
    // Of each warp the lanes in a fixed random order; of the warps now this one, now that one runs ahead as far as it can.
    const int warps = (int)machine.warps.size();
    for (int w = 0; w < warps; ++w)
        for (int i = std::min(32, threads - w * 32) - 1; i > 0; --i) std::swap(order[w * 32 + i], order[w * 32 + draw(i + 1)]);
    bool moved = false;
    for (int left = threads; left;) {
        const bool all = !moved;  // nobody moved in the last round: this time every warp has a turn
        moved = false;
        const int first = (int)draw(warps);
        for (int turn = 0; turn < warps; ++turn) {
            const int w = (first + turn) % warps;
            if (!all && draw(2)) continue;
            for (bool again = true; again;) {
                again = false;
                for (int i = w * 32; i < std::min(threads, w * 32 + 32); ++i) {
                    Fiber& f = machine.fibers[order[i]];
                    if (f.done || (f.counter && *f.counter == f.seen)) continue;
                    f.counter = nullptr;
                    again = moved = true;
                    if (!step(f)) return false;
                    if (f.done && !ended(f, left)) return false;
                }
            }
        }
        if (all && !moved) {
            snprintf(machine.error, sizeof machine.error, "block (%u, %u, %u) is stuck: a barrier or warp operation was not reached by all threads",
                     machine.block.x, machine.block.y, machine.block.z);
            return false;
        }
    }
    return true;
}

template <class... A, size_t... I>
int launch(void (*kernel)(A...), void** arguments, std::index_sequence<I...>, uint3 grid, uint3 block, size_t shared) {
    auto call = [&] { kernel(*(A*)arguments[I]...); };
    machine.body = [](void* closure) { (*(decltype(call)*)closure)(); };
    machine.closure = &call;
    machine.grid_dim = grid;
    machine.block_dim = block;
    machine.shared_bytes = shared;
    machine.error[0] = 0;
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); ++i) order[i] = (unsigned)i;
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[draw((unsigned)i + 1)]);
    for (unsigned i : order) {
        machine.block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        if (!run_block()) return 1;
    }
    return 0;
}

template <class... A> int launch(void (*kernel)(A...), void** arguments, uint3 grid, uint3 block, size_t shared) {
    return launch(kernel, arguments, std::index_sequence_for<A...>{}, grid, block, shared);
}

template <class... A> int argument_sizes(void (*)(A...), int* sizes) {
    int all[] = {(int)sizeof(A)..., 0};
    for (size_t i = 0; i < sizeof...(A); ++i) sizes[i] = all[i];
    return sizeof...(A);
}

}  // namespace emulate

#define threadIdx (emulate::machine.current->thread)
#define blockIdx (emulate::machine.block)
#define blockDim (emulate::machine.block_dim)
#define gridDim (emulate::machine.grid_dim)

// ---- CUDA's own functions
static inline void __syncthreads() { emulate::barrier(); }
static inline void __syncwarp() { emulate::together<int, int>("__syncwarp", 0, [](int*, int*) {}); }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.f / a; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
using std::fmaf;
using std::fmaxf;
using std::fminf;
static inline float __int2float_rn(int a) { return (float)a; }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned atomicMax(unsigned* at, unsigned value) { unsigned old = *at; *at = std::max(old, value); return old; }
static inline int atomicAdd(int* at, int value) { int old = *at; *at = int(unsigned(old) + unsigned(value)); return old; }
static inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lane_mask) {
    struct In { unsigned value; int mask; };
    return emulate::together<In, unsigned>("__shfl_xor_sync", In{value, lane_mask}, [](In* in, unsigned* out) {
        for (int i = 0; i < 32; ++i) out[i] = in[i ^ in[i].mask].value;
    });
}
static inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
    return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), lane_mask));
}
static inline int __all_sync(unsigned, int predicate) {
    return emulate::together<int, int>("__all_sync", predicate, [](int* in, int* out) {
        int all = 1;
        for (int i = 0; i < 32; ++i) all &= in[i] != 0;
        for (int i = 0; i < 32; ++i) out[i] = all;
    });
}

// ---- common/numbers.cuh
static inline float half_to_float(unsigned short bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static inline unsigned float_to_half_bits(float x) { _Float16 h = (_Float16)x; unsigned short b; memcpy(&b, &h, 2); return b; }
static inline unsigned float_to_bfloat16_bits(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
static inline unsigned floats_to_bfloat16x2(float low, float high) { return float_to_bfloat16_bits(low) | float_to_bfloat16_bits(high) << 16; }
static inline unsigned floats_to_halfx2(float low, float high) { return float_to_half_bits(low) | float_to_half_bits(high) << 16; }
static inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }
static inline float min_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::min(a, b); }

static inline float approximate_reciprocal(float x) { return 1.f / x * (1.f + 1.2e-7f * (int(emulate::draw(3)) - 1)); }
static inline unsigned pairwise(unsigned a, unsigned b, float (*value)(unsigned short), bool most) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 16) {
        unsigned short low = (unsigned short)(a >> i), high = (unsigned short)(b >> i);
        float x = value(low), y = value(high);
        result |= unsigned(std::isnan(x) ? high : std::isnan(y) ? low : (most ? x > y : x < y) ? low : high) << i;
    }
    return result;
}
static inline float from_bfloat16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
static inline unsigned bfloat16x2_max(unsigned a, unsigned b) { return pairwise(a, b, from_bfloat16, true); }
static inline unsigned bfloat16x2_min(unsigned a, unsigned b) { return pairwise(a, b, from_bfloat16, false); }
static inline unsigned halfx2_max(unsigned a, unsigned b) { return pairwise(a, b, half_to_float, true); }
static inline unsigned halfx2_min(unsigned a, unsigned b) { return pairwise(a, b, half_to_float, false); }
static inline unsigned pairwise_or_nan(unsigned a, unsigned b, float (*value)(unsigned short), bool most) {
    unsigned result = pairwise(a, b, value, most);
    for (int i = 0; i < 32; i += 16)
        if (std::isnan(value((unsigned short)(a >> i))) || std::isnan(value((unsigned short)(b >> i)))) result |= 0x7fffu << i;
    return result;
}
static inline unsigned bfloat16x2_max_or_nan(unsigned a, unsigned b) { return pairwise_or_nan(a, b, from_bfloat16, true); }
static inline unsigned bfloat16x2_min_or_nan(unsigned a, unsigned b) { return pairwise_or_nan(a, b, from_bfloat16, false); }
static inline unsigned halfx2_max_or_nan(unsigned a, unsigned b) { return pairwise_or_nan(a, b, half_to_float, true); }
static inline unsigned halfx2_min_or_nan(unsigned a, unsigned b) { return pairwise_or_nan(a, b, half_to_float, false); }
static inline unsigned pairwise_fma(unsigned a, unsigned b, unsigned c, float (*value)(unsigned short), unsigned (*bits)(float)) {
    unsigned result = 0;  // a float has room for the product, and for what matters of the sum
    for (int i = 0; i < 32; i += 16)
        result |= bits(float(double(value((unsigned short)(a >> i))) * value((unsigned short)(b >> i)) + value((unsigned short)(c >> i)))) << i;
    return result;
}
static inline unsigned bfloat16x2_fma(unsigned a, unsigned b, unsigned c) { return pairwise_fma(a, b, c, from_bfloat16, float_to_bfloat16_bits); }
static inline unsigned halfx2_fma(unsigned a, unsigned b, unsigned c) { return pairwise_fma(a, b, c, half_to_float, float_to_half_bits); }
static inline float approximate_exp2(float x) {
    const float y = (float)std::exp2((double)x) * (1.f + 1.2e-7f * (int(emulate::draw(5)) - 2));
    return y < 1.17549435e-38f ? 0.f : y;
}

// ---- common/memory.cuh
struct Words4;
template <class V = Words4> static inline V load_constant(const void* from) {
    if ((uintptr_t)from % 16) emulate::fail("a load of 16 bytes is not aligned to 16 bytes");
    V v;
    memcpy(&v, from, 16);
    return v;
}
static inline void load_constant_if(bool there, unsigned* word, const void* from) {
    if (there && (uintptr_t)from % 16) emulate::fail("a load of 16 bytes is not aligned to 16 bytes");
    if (there) memcpy(word, from, 16);
}
static inline void copy16_async(void* to, const void* from, int valid) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulate::fail("a copy of 16 bytes is not aligned to 16 bytes");
    if (valid < 0 || valid > 16) emulate::fail("a copy of other than 0 to 16 bytes");
    auto* base = emulate::shared_memory();
    if ((unsigned char*)to < base || (unsigned char*)to + 16 > base + emulate::machine.shared_bytes) emulate::fail("a copy to outside of shared memory");
    emulate::Copy copy{to, from, valid};
    if (emulate::machine.early_copies) emulate::land(copy);
    else emulate::machine.current->open.push_back(copy);
}
static inline void copy16_async_near(void* to, const void* from, int valid) { copy16_async(to, from, valid); }
static inline void copy16_async_once(void* to, const void* from, bool exists) { copy16_async(to, from, exists ? 16 : 0); }
static inline void copies_commit() {
    auto* self = emulate::machine.current;
    self->groups.push_back(std::move(self->open));
    self->open.clear();
}
template <int pending> static inline void copies_wait() { emulate::land_all_but(pending); }
static inline unsigned warp_max(unsigned value) {
    return emulate::together<unsigned, unsigned>("warp_max", value, [](unsigned* in, unsigned* out) {
        unsigned most = *std::max_element(in, in + 32);
        std::fill(out, out + 32, most);
    });
}

// ---- common/overlap.cuh: kernels run one after the other
static inline void let_next_kernel_start() {}
static inline void wait_for_kernel_before() {}
template <class V = Words4> static inline V load_fresh(const void* from) { return load_constant<V>(from); }

// ---- mma/int8.cuh
static inline void load_fragments(unsigned (&fragment)[4], const void* row) {
    struct Out { unsigned word[4]; };
    if ((uintptr_t)row % 16) emulate::fail("a row of a matrix is not aligned to 16 bytes");
    Out got = emulate::together<const unsigned char*, Out>("load_fragments", (const unsigned char*)row, [](const unsigned char** rows, Out* out) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) memcpy(&out[lane].word[m], rows[8 * m + lane / 4] + 4 * (lane % 4), 4);
    });
    memcpy(fragment, got.word, sizeof got.word);
}
// sum += a (16 rows) times b (8 columns): a lane's words hold `Value`s, that `to` makes factors of; 128 bits of K are a step.
template <class Value, class Sum, class Total, class To>
void multiply_add_of(const char* operation, Sum (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, To to) {
    struct In { unsigned a[4], b[2]; Sum sum[4]; } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
    struct Out { Sum sum[4]; };
    constexpr int word = 4 / sizeof(Value), K = 8 * word;
    Out got = emulate::together<In, Out>(operation, in, [to](In* lanes, Out* out) {
        Value a[16][K], b[8][K];
        Total left[16][K], right[8][K];
        for (int lane = 0; lane < 32; ++lane) {
            int group = lane / 4, column = lane % 4 * word;
            memcpy(&a[group][column], &lanes[lane].a[0], 4);
            memcpy(&a[group + 8][column], &lanes[lane].a[1], 4);
            memcpy(&a[group][column + K / 2], &lanes[lane].a[2], 4);
            memcpy(&a[group + 8][column + K / 2], &lanes[lane].a[3], 4);
            memcpy(&b[group][column], &lanes[lane].b[0], 4);
            memcpy(&b[group][column + K / 2], &lanes[lane].b[1], 4);
        }
        for (int k = 0; k < K; ++k) {
            for (int row = 0; row < 16; ++row) left[row][k] = to(a[row][k]);
            for (int column = 0; column < 8; ++column) right[column][k] = to(b[column][k]);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                Total sum = lanes[lane].sum[i];
                for (int k = 0; k < K; ++k) sum += left[row][k] * right[column][k];
                out[lane].sum[i] = (Sum)sum;
            }
    });
    memcpy(sum, got.sum, sizeof got.sum);
}
static inline void multiply_add(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_of<signed char, int, int>("multiply_add", sum, a, b0, b1, [](signed char code) { return (int)code; });
}
static inline unsigned negative_bytes(unsigned word) {
    unsigned mask = 0;
    for (int i = 0; i < 4; ++i) mask |= (word >> (8 * i + 7) & 1u ? 0xffu : 0u) << (8 * i);
    return mask;
}

// ---- mma/e4m3.cuh and mma/float16.cuh: exact sums, rounded once; the hardware rounds more often
static inline float from_e4m3(unsigned char code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = (code & 127) == 127 ? NAN : exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
    return code & 128 ? -magnitude : magnitude;
}
static inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_of<unsigned char, float, double>("multiply_add of E4M3", sum, a, b0, b1, from_e4m3);
}
template <bool half> static inline float from_float16(unsigned short bits) { return half ? half_to_float(bits) : from_bfloat16(bits); }
template <bool half> static inline void multiply_add_float16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_of<unsigned short, float, double>("multiply_add_float16", sum, a, b0, b1, from_float16<half>);
}
template <bool half> static inline unsigned subtract_float16x2(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 16) {
        float difference = from_float16<half>((unsigned short)(a >> i)) - from_float16<half>((unsigned short)(b >> i));
        result |= (half ? float_to_half_bits(difference) : float_to_bfloat16_bits(difference)) << i;
    }
    return result;
}
