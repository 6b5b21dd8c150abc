// What the bindings of writing text on the CPU share: the chosen kernels, and work taken by whichever thread is free.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "instructions.h"

namespace wkv {

using at::Tensor;
using Tensors = std::vector<Tensor>;

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
