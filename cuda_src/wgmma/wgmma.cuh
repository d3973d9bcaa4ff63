// wgmma: 128 threads multiply a 64-row A by an N-column B into registers: int8 into int32; 8-bit floats
// (E4M3) or 16-bit floats into float. The instruction is asynchronous: issue, commit, wait. B is read from
// shared memory, A from shared memory or, where it has bytes, from registers. A step takes 32 bytes of a row.
//
// Registers of one thread (lane = thread % 32, warp = thread / 32 % 4):
//   D  d[4j + 2h + e] = row 16 warp + lane / 4 + 8h, column 8j + 2 (lane % 4) + e
//   A  a[h + 2c] byte b = row 16 warp + lane / 4 + 8h, column 16c + 4 (lane % 4) + b
#pragma once
#include "mma/int8.cuh"
#include "wgmma/layout.cuh"

// Before the first wgmma after ordinary code touched its registers.
SQ_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SQ_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` committed groups are still running.
template <int Pending>
SQ_INLINE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving reads of the accumulators above a wait that it cannot see through.
template <int Count>
SQ_INLINE void pin(int (&values)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(values[i])::"memory");
}
template <int Count>
SQ_INLINE void pin(float (&values)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define SQ_NAMES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SQ_NAMES_80 SQ_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SQ_NAMES_96 SQ_NAMES_64 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SQ_NAMES_128 SQ_NAMES_96 ", " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SQ_NAMES_160 SQ_NAMES_128 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SQ_NAMES_176 SQ_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SQ_NAMES_192 SQ_NAMES_128 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SQ_NAMES_256 SQ_NAMES_192 ", " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SQ_VALUE4(r, b) r(d[b]), r(d[b + 1]), r(d[b + 2]), r(d[b + 3])
#define SQ_VALUE16(r, b) SQ_VALUE4(r, b), SQ_VALUE4(r, b + 4), SQ_VALUE4(r, b + 8), SQ_VALUE4(r, b + 12)
#define SQ_VALUE32(r, b) SQ_VALUE16(r, b), SQ_VALUE16(r, b + 16)
#define SQ_VALUES_64(r) SQ_VALUE32(r, 0)
#define SQ_VALUES_80(r) SQ_VALUES_64(r), SQ_VALUE4(r, 32), SQ_VALUE4(r, 36)
#define SQ_VALUES_96(r) SQ_VALUES_64(r), SQ_VALUE16(r, 32)
#define SQ_VALUES_128(r) SQ_VALUES_64(r), SQ_VALUE32(r, 32)
#define SQ_VALUES_160(r) SQ_VALUES_128(r), SQ_VALUE16(r, 64)
#define SQ_VALUES_176(r) SQ_VALUES_160(r), SQ_VALUE4(r, 80), SQ_VALUE4(r, 84)
#define SQ_VALUES_192(r) SQ_VALUES_128(r), SQ_VALUE32(r, 64)
#define SQ_VALUES_256(r) SQ_VALUES_192(r), SQ_VALUE32(r, 96)

template <int N> struct Wgmma;           // int8 m64 N k32
template <int N> struct WgmmaE4m3;       // 8-bit floats m64 N k32
template <int N> struct WgmmaBfloat16;   // m64 N k16
template <int N> struct WgmmaHalf;       // m64 N k16

// d += a · bᵀ, or with `start` d = a · bᵀ. KIND names the types, r is how assembly calls a register of d; behind the
// operands: whether to add to d, and for floats the signs of a and b; for 16-bit ones also that neither is transposed.
#define SQ_FROM_SHARED(NAME, N, D, KIND, r, LAST, O0, O1)                                         \
    static SQ_INLINE void NAME(D (&d)[N / 2], uint64 a, uint64 b) {                               \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N KIND " {" SQ_NAMES_##N "}, " O0 ", "  \
                     O1 ", " LAST ";" : SQ_VALUES_##N(r) : "l"(a), "l"(b));                       \
    }
#define SQ_FROM_REGISTERS(NAME, N, D, KIND, r, LAST, O0, O1, O2, O3, O4)                          \
    static SQ_INLINE void NAME(D (&d)[N / 2], const uint32 (&a)[4], uint64 b) {                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N KIND " {" SQ_NAMES_##N "}, {" O0 ", " \
                     O1 ", " O2 ", " O3 "}, " O4 ", " LAST ";" : SQ_VALUES_##N(r)                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }
#define SQ_CODES(N, D, KIND, r, w, LAST, O0, O1, O2, O3, O4)                                      \
    SQ_FROM_SHARED(multiply, N, D, KIND, "+" r, "1" LAST, O0, O1)                                 \
    SQ_FROM_SHARED(start, N, D, KIND, w r, "0" LAST, O0, O1)                                      \
    SQ_FROM_REGISTERS(multiply, N, D, KIND, "+" r, "1" LAST, O0, O1, O2, O3, O4)                  \
    SQ_FROM_REGISTERS(start, N, D, KIND, w r, "0" LAST, O0, O1, O2, O3, O4)
#define SQ_WGMMA(N, O0, O1, O2, O3, O4)                                                           \
    template <> struct Wgmma<N> {                                                                 \
        SQ_CODES(N, int, "k32.s32.s8.s8", "r", SQ_WRITTEN, "", O0, O1, O2, O3, O4)                       \
    };                                                                                            \
    template <> struct WgmmaE4m3<N> {                                                             \
        SQ_CODES(N, float, "k32.f32.e4m3.e4m3", "f", SQ_WRITTEN, ", 1, 1", O0, O1, O2, O3, O4)           \
    };                                                                                            \
    template <> struct WgmmaBfloat16<N> {                                                         \
        SQ_FROM_SHARED(multiply, N, float, "k16.f32.bf16.bf16", "+f", "1, 1, 1, 0, 0", O0, O1)    \
    };                                                                                            \
    template <> struct WgmmaHalf<N> {                                                             \
        SQ_FROM_SHARED(multiply, N, float, "k16.f32.f16.f16", "+f", "1, 1, 1, 0, 0", O0, O1)      \
    };

#ifndef SQ_WRITTEN
#define SQ_WRITTEN "="
#endif
SQ_WGMMA(64, "%32", "%33", "%34", "%35", "%36")
SQ_WGMMA(80, "%40", "%41", "%42", "%43", "%44")
SQ_WGMMA(96, "%48", "%49", "%50", "%51", "%52")
SQ_WGMMA(128, "%64", "%65", "%66", "%67", "%68")
SQ_WGMMA(160, "%80", "%81", "%82", "%83", "%84")
SQ_WGMMA(176, "%88", "%89", "%90", "%91", "%92")
SQ_WGMMA(192, "%96", "%97", "%98", "%99", "%100")
SQ_WGMMA(256, "%128", "%129", "%130", "%131", "%132")
