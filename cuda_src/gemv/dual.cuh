// One scale of the activations in a segment, or two of them, one for each sign.
#pragma once
#include "common/device.cuh"

#define PATHS (DUAL ? 2 : 1)

SQ_INLINE bool two_steps(const int* duals, int segment) { return DUAL && (!duals || duals[segment]); }
