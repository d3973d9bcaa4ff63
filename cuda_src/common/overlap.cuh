// Two kernels in a row of which the second one starts before the first one ends, sm_90 and later. The second one has to be
// launched in this way (Launcher's `early`). OVERLAP 0: one after the other, on any GPU.
#pragma once
#include "common/memory.cuh"

#ifdef __CUDACC__
// In the first kernel: the next one may start as soon as there is room for its blocks.
SQ_INLINE void let_next_kernel_start() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the second one: until the first one has ended and all that it wrote is there.
SQ_INLINE void wait_for_kernel_before() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of what a kernel wrote that ran at the same time: not through the cache for data that nobody writes.
SQ_INLINE Words4 load_fresh(const void* from) {
    Words4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from) : "memory");
    return v;
}
#endif
