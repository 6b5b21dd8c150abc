// From torch tensors to the plain arguments of drawing tokens, the same for CPU and CUDA.
#pragma once

#include <ATen/ATen.h>

#include "sample.h"

namespace wkv {

using at::Tensor;

// torch.ops.rwkv_wkv.decode_sample. RUN draws, on the device that the tensors are on; the result is [2, rows]. `rows` is
// [slots, 4], as SampledRow; it and the other tables may have more slots than there are rows of logits.
template <void (*RUN)(const Sample&, at::Device)>
Tensor decode_sample(const Tensor& logits, const Tensor& next, int64_t n_blank, const Tensor& weight, const Tensor& uniforms,
                     const Tensor& tokens, const Tensor& counts, const Tensor& rows, double presence, double frequency, double decay,
                     double temperature, double top_p, int64_t top_k) {
    const int64_t n = logits.size(0), vocabulary = logits.size(1), slots = rows.size(0), capacity = tokens.size(1);
    auto check = [&](const Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
        TORCH_CHECK(x.scalar_type() == type && x.sizes() == sizes && x.is_contiguous() && x.device() == logits.device(),
                    "decode_sample: a tensor is not ", type, " ", sizes);
    };
    check(logits, at::kFloat, {n, vocabulary});
    check(next, at::kShort, {next.size(0), vocabulary});
    check(weight, at::kFloat, {vocabulary});
    check(uniforms, at::kDouble, {slots, capacity});
    check(tokens, at::kInt, {slots, capacity});
    check(counts, at::kFloat, {slots, capacity});
    check(rows, at::kInt, {slots, 4});
    TORCH_CHECK(n <= slots, "decode_sample: ", n, " rows in ", slots, " slots");
    Tensor drawn = at::empty({2, n}, rows.options());
    RUN(Sample{logits.data_ptr<float>(), next.const_data_ptr<short>(), weight.const_data_ptr<float>(),
               uniforms.const_data_ptr<double>(), tokens.data_ptr<int>(), counts.data_ptr<float>(),
               static_cast<SampledRow*>(rows.data_ptr()), drawn.data_ptr<int>(), static_cast<int>(n), static_cast<int>(vocabulary),
               static_cast<int>(capacity), static_cast<int>(n_blank), static_cast<float>(presence), static_cast<float>(frequency),
               static_cast<float>(decay), static_cast<float>(temperature), top_p, static_cast<int>(top_k)},
        logits.device());
    return drawn;
}

}  // namespace wkv
