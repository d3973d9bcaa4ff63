// Memory: sixteen bytes at a time, and copies to shared memory that do not wait.
#pragma once
#include "common/device.cuh"

#ifdef __CUDACC__
// Through the cache for data that nobody writes while the kernel runs.
SQ_INLINE Words4 load_constant(const void* from) {
    Words4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from));
    return v;
}

// The same into words that stay as they are where there is nothing. A choice between what was loaded and something
// else would wait for the load.
SQ_INLINE void load_constant_if(bool there, uint32* word, const void* from) {
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\n@there ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3]) : "l"(from), "r"((uint32)there));
}

SQ_INLINE uint32 shared_address(const void* pointer) { return (uint32)__cvta_generic_to_shared(pointer); }

// Sixteen bytes from global to shared memory, of which the first `valid` are read and the others
// become zero.
SQ_INLINE void copy16_async(void* to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
}
// The same by way of the multiprocessor's own cache, for neighbors of these bytes that are copied next.
SQ_INLINE void copy16_async_near(void* to, const void* from, int valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
}
// All sixteen bytes or none, of data that nobody will read again: first to leave the cache, so that what is small and wanted by
// all stays.
SQ_INLINE void copy16_async_once(void* to, const void* from, bool exists) {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;"
                 :: "r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0), "l"(policy) : "memory");
}
SQ_INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `pending` committed groups have landed.
template <int pending> SQ_INLINE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}

SQ_INLINE uint32 warp_max(uint32 value) { return __reduce_max_sync(0xffffffffu, value); }
#endif
