// wgmma with A from registers and any number of columns that is a multiple of 16: for a weight that is unpacked on its
// way, and a low-rank branch on top of it. B is read from shared memory, rows of 128 bytes, swizzled.
//
// Registers of one thread: d and int8 codes as in wgmma.cuh; of 16-bit factors
//   A  a[h + 2c] half b = row 16 warp + lane / 4 + 8h, column 8c + 2 (lane % 4) + b
// Floats are summed in the registers that held int32 sums, as their bits.
#pragma once
#include "wgmma/wgmma.cuh"

#if LOW_RANK == 2
#define SQ_FACTORS "f16.f16"
#else
#define SQ_FACTORS "bf16.bf16"
#endif

#define SQ_D_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SQ_D_32 SQ_D_16 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define SQ_D_48 SQ_D_32 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define SQ_D_64 SQ_D_48 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define SQ_D_80 SQ_D_64 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define SQ_D_96 SQ_D_80 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define SQ_D_112 SQ_D_96 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define SQ_D_128 SQ_D_112 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define SQ_D_144 SQ_D_128 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define SQ_D_160 SQ_D_144 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define SQ_D_176 SQ_D_160 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define SQ_D_192 SQ_D_176 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define SQ_D_208 SQ_D_192 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define SQ_D_224 SQ_D_208 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define SQ_D_240 SQ_D_224 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define SQ_D_256 SQ_D_240 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define SQ_INTO_FOUR(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SQ_INTO_16 SQ_INTO_FOUR(0), SQ_INTO_FOUR(4)
#define SQ_INTO_32 SQ_INTO_16, SQ_INTO_FOUR(8), SQ_INTO_FOUR(12)
#define SQ_INTO_48 SQ_INTO_32, SQ_INTO_FOUR(16), SQ_INTO_FOUR(20)
#define SQ_INTO_64 SQ_INTO_48, SQ_INTO_FOUR(24), SQ_INTO_FOUR(28)
#define SQ_INTO_80 SQ_INTO_64, SQ_INTO_FOUR(32), SQ_INTO_FOUR(36)
#define SQ_INTO_96 SQ_INTO_80, SQ_INTO_FOUR(40), SQ_INTO_FOUR(44)
#define SQ_INTO_112 SQ_INTO_96, SQ_INTO_FOUR(48), SQ_INTO_FOUR(52)
#define SQ_INTO_128 SQ_INTO_112, SQ_INTO_FOUR(56), SQ_INTO_FOUR(60)
#define SQ_INTO_144 SQ_INTO_128, SQ_INTO_FOUR(64), SQ_INTO_FOUR(68)
#define SQ_INTO_160 SQ_INTO_144, SQ_INTO_FOUR(72), SQ_INTO_FOUR(76)
#define SQ_INTO_176 SQ_INTO_160, SQ_INTO_FOUR(80), SQ_INTO_FOUR(84)
#define SQ_INTO_192 SQ_INTO_176, SQ_INTO_FOUR(88), SQ_INTO_FOUR(92)
#define SQ_INTO_208 SQ_INTO_192, SQ_INTO_FOUR(96), SQ_INTO_FOUR(100)
#define SQ_INTO_224 SQ_INTO_208, SQ_INTO_FOUR(104), SQ_INTO_FOUR(108)
#define SQ_INTO_240 SQ_INTO_224, SQ_INTO_FOUR(112), SQ_INTO_FOUR(116)
#define SQ_INTO_256 SQ_INTO_240, SQ_INTO_FOUR(120), SQ_INTO_FOUR(124)

#define SQ_REGISTERS_TIMES_SHARED(NAME, N, KIND, LAST, O0, O1, O2, O3, O4, O5)                                \
    static SQ_INLINE void NAME(int (&d)[N / 2], const uint32 (&a)[4], uint64 b, int onto = 1) {               \
        asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, " O5 ", 0;\n"                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N KIND " {" SQ_D_##N "}, {" O0 ", " O1 ", " O2 ", " \
                     O3 "}, " O4 ", onto" LAST ";\n}"                                                        \
                     : SQ_INTO_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(onto));          \
    }

// d = a · bᵀ, or with `onto` d + a · bᵀ: 32 columns of int8 codes, or 16 columns of 16-bit factors.
template <int N> struct FromRegisters;
#define SQ_FROM_REGISTERS_N(N, ...)                                                                      \
    template <> struct FromRegisters<N> {                                                                \
        SQ_REGISTERS_TIMES_SHARED(codes, N, "k32.s32.s8.s8", "", __VA_ARGS__)                            \
        SQ_REGISTERS_TIMES_SHARED(factors, N, "k16.f32." SQ_FACTORS, ", 1, 1, 0", __VA_ARGS__)           \
    };
SQ_FROM_REGISTERS_N(16, "%8", "%9", "%10", "%11", "%12", "%13")
SQ_FROM_REGISTERS_N(32, "%16", "%17", "%18", "%19", "%20", "%21")
SQ_FROM_REGISTERS_N(48, "%24", "%25", "%26", "%27", "%28", "%29")
SQ_FROM_REGISTERS_N(64, "%32", "%33", "%34", "%35", "%36", "%37")
SQ_FROM_REGISTERS_N(80, "%40", "%41", "%42", "%43", "%44", "%45")
SQ_FROM_REGISTERS_N(96, "%48", "%49", "%50", "%51", "%52", "%53")
SQ_FROM_REGISTERS_N(112, "%56", "%57", "%58", "%59", "%60", "%61")
SQ_FROM_REGISTERS_N(128, "%64", "%65", "%66", "%67", "%68", "%69")
SQ_FROM_REGISTERS_N(144, "%72", "%73", "%74", "%75", "%76", "%77")
SQ_FROM_REGISTERS_N(160, "%80", "%81", "%82", "%83", "%84", "%85")
SQ_FROM_REGISTERS_N(176, "%88", "%89", "%90", "%91", "%92", "%93")
SQ_FROM_REGISTERS_N(192, "%96", "%97", "%98", "%99", "%100", "%101")
SQ_FROM_REGISTERS_N(208, "%104", "%105", "%106", "%107", "%108", "%109")
SQ_FROM_REGISTERS_N(224, "%112", "%113", "%114", "%115", "%116", "%117")
SQ_FROM_REGISTERS_N(240, "%120", "%121", "%122", "%123", "%124", "%125")
SQ_FROM_REGISTERS_N(256, "%128", "%129", "%130", "%131", "%132", "%133")
