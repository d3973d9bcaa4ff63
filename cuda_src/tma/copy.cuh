// The bulk tensor copy engine (TMA): one thread asks for a box of a matrix, the engine computes the
// addresses, fills what lies outside with zeros (loads) or leaves it alone (stores), and swizzles.
#pragma once
#include "tma/barrier.cuh"

// A CUtensorMap as the driver encodes it. NVRTC cannot include cuda.h, and needs only the size.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

SQ_INLINE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Box at (column, row) → shared memory; its bytes count at `barrier`.
SQ_INLINE void load_box(const TensorMap* map, void* box, uint64* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(box)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// `bytes` in a row, a multiple of 16, as both addresses are.
SQ_INLINE void load_bytes(const void* from, void* to, uint64* barrier, uint32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Shared memory → box at (column, row).
SQ_INLINE void store_box(const TensorMap* map, const void* box, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(box)), "r"(column), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `Pending` of this thread's stores still read their shared memory.
template <int Pending>
SQ_INLINE void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Ordinary stores to shared memory become visible to the copy engine.
SQ_INLINE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
