// A box of three dimensions by the copy engine: several pieces of memory that lie apart, one after the other.
#pragma once
#include "tma/copy.cuh"

SQ_INLINE void load_block(const TensorMap* map, void* block, uint64* barrier, int column, int row, int layer) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(block)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer)
        : "memory");
}
