// mbarriers: how a copy tells threads that its bytes have arrived, and how threads say that a buffer
// is free again. A barrier flips its phase bit when the announced arrivals and bytes are complete.
#pragma once
#include "common/memory.cuh"

SQ_INLINE void barrier_init(uint64* barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Make the initialised barriers visible to the copy engine.
SQ_INLINE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrive once and announce how many bytes copies will bring in this phase.
SQ_INLINE void barrier_expect(uint64* barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// NOTE: in the scope of the block, which is the default. `.release.cluster` would compile to a fence of the whole
// GPU, which takes longer than a small stage.
SQ_INLINE void barrier_arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Wait until the phase of this parity is over. The hardware suspends the thread for a while by itself.
SQ_INLINE void barrier_wait(uint64* barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
