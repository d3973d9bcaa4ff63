// wgmma: 128 threads multiply a 64-row A by an N-column B, both int8, into int32 registers.
// The instruction is asynchronous: issue, commit, wait. B is read from shared memory, A from shared
// memory or from registers.
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

#define SQ_NAMES_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SQ_NAMES_1 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SQ_NAMES_2 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SQ_NAMES_3 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SQ_VALUE4(b) "+r"(d[b]), "+r"(d[b + 1]), "+r"(d[b + 2]), "+r"(d[b + 3])
#define SQ_VALUE16(b) SQ_VALUE4(b), SQ_VALUE4(b + 4), SQ_VALUE4(b + 8), SQ_VALUE4(b + 12)
#define SQ_VALUES(b) SQ_VALUE16(b), SQ_VALUE16(b + 16)

template <int N> struct Wgmma;  // int8 m64 N k32

// d += a · bᵀ
#define SQ_WGMMA(N, NAMES, VALUES, O0, O1, O2, O3, O4)                                                          \
    template <> struct Wgmma<N> {                                                                               \
        static SQ_INLINE void multiply(int (&d)[N / 2], uint64 a, uint64 b) {                                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" NAMES "}, " O0 ", " O1 ", 1;" \
                         : VALUES : "l"(a), "l"(b));                                                            \
        }                                                                                                       \
        static SQ_INLINE void multiply(int (&d)[N / 2], const uint32 (&a)[4], uint64 b) {                       \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" NAMES "}, "                   \
                         "{" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", 1;"                                         \
                         : VALUES : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
        }                                                                                                       \
    };

#define SQ_VALUES_64 SQ_VALUES(0)
SQ_WGMMA(64, SQ_NAMES_0, SQ_VALUES_64, "%32", "%33", "%34", "%35", "%36")
#define SQ_VALUES_128 SQ_VALUES(0), SQ_VALUES(32)
SQ_WGMMA(128, SQ_NAMES_0 ", " SQ_NAMES_1, SQ_VALUES_128, "%64", "%65", "%66", "%67", "%68")
#define SQ_VALUES_192 SQ_VALUES(0), SQ_VALUES(32), SQ_VALUES(64)
SQ_WGMMA(192, SQ_NAMES_0 ", " SQ_NAMES_1 ", " SQ_NAMES_2, SQ_VALUES_192, "%96", "%97", "%98", "%99", "%100")
#define SQ_VALUES_256 SQ_VALUES(0), SQ_VALUES(32), SQ_VALUES(64), SQ_VALUES(96)
SQ_WGMMA(256, SQ_NAMES_0 ", " SQ_NAMES_1 ", " SQ_NAMES_2 ", " SQ_NAMES_3, SQ_VALUES_256, "%128", "%129", "%130", "%131", "%132")
