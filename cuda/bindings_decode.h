// What the bindings of writing text on the CPU share: which instruction set serves, and work taken by whichever thread is free.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "decode_kernels.h"

namespace wkv {

using at::Tensor;
using Tensors = std::vector<Tensor>;

inline const DecodeKernels& choose_kernels() {
    const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__) && !defined(__clang__)
    if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16")) return AVX512BF16_DECODE;
#endif
    return capability == "AVX512" ? AVX512_DECODE : capability == "AVX2" ? AVX2_DECODE : PLAIN_DECODE;
}

inline const DecodeKernels& kernels() {
    static const DecodeKernels& chosen = choose_kernels();
    return chosen;
}

// Calls f(i) for i < n, each taken by whichever thread is free.
template <class F>
void spread(int64_t n, F f) {
    if (n == 1) return f(0);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t i = next++; i < n; i = next++) f(i);
    });
}

inline float* data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }
inline float* data(const std::optional<Tensor>& x) { return x ? data(*x) : nullptr; }

}  // namespace wkv
