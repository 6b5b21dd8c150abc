// The CPU's entry points: one head of one sequence a call, so that the caller spreads them over its threads.
#pragma once

#include "arguments.h"

namespace wkv {

constexpr int CPU_INTERVAL_TOKENS = 16;
constexpr int CPU_LARGEST_HEAD = 128;

struct CpuKernels {
    void (*forward6)(const Shape& shape, const Forward6& x, int sequence, int head);
    void (*backward6)(const Shape& shape, const Backward6& x, int sequence, int head);
    void (*forward7)(const Shape& shape, const Forward7& x, int sequence, int head);
    void (*backward7)(const Shape& shape, const Backward7& x, int sequence, int head);
};

extern const CpuKernels AVX512_KERNELS, AVX2_KERNELS, PLAIN_KERNELS;

}  // namespace wkv
