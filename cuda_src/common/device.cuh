// What every kernel source starts with.
//
// NVRTC and nvcc compile the sources for the device; a C++ compiler compiles the same sources for the
// host, where tests/emulate/emulate.h stands in for the hardware. What only the hardware can do is
// written once, in the headers of this folder and in mma/, under #ifdef __CUDACC__; the emulation
// has a function of the same name. Kernels themselves contain no such #ifdef, and no source includes
// a CUDA header: NVRTC needs nothing on disk.
#pragma once

#ifdef __CUDACC__
#define SQ_INLINE __device__ __forceinline__
#define SQ_MEMBER __device__ __forceinline__
#define SQ_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define SQ_INLINE static inline
#define SQ_MEMBER inline
#endif

typedef signed char int8;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

// Sixteen bytes, the widest access that a thread has.
struct alignas(16) Words4 { uint32 word[4]; };
