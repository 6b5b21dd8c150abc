// torch.ops.rwkv_wkv: the operators' schemas and their CPU kernels. Fake kernels and autograd are in src/kernels/operators.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "bindings.h"
#include "instructions.h"

namespace {

using namespace wkv;

// Heads are taken one by one by whichever thread is free: sequences differ in length.
template <class Arguments>
void over_heads(void (*kernel)(const Shape&, const Arguments&, int, int), const Shape& shape, const Arguments& x) {
    TORCH_CHECK(shape.interval == CPU_INTERVAL_TOKENS, "wkv: checkpoints lie ", CPU_INTERVAL_TOKENS, " tokens apart on the CPU");
    TORCH_CHECK(shape.head_size <= CPU_LARGEST_HEAD, "wkv: heads of ", shape.head_size, " are over ", CPU_LARGEST_HEAD);
    const int items = shape.n_sequences * shape.n_head;
    std::atomic<int> next{0};
    at::parallel_for(0, std::min(items, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int item = next++; item < items; item = next++) kernel(shape, x, item / shape.n_head, item % shape.n_head);
    });
}

void run6(const Shape& shape, const Forward6& x) { over_heads(cpu_kernels().forward6, shape, x); }
void run7(const Shape& shape, const Forward7& x) { over_heads(cpu_kernels().forward7, shape, x); }

auto wkv6_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state,
                  const Tensor& cu_seqlens, const Tensor&, int64_t interval, bool, bool checkpoints) {
    return forward6(run6, r, log_w, k, v, u, state, cu_seqlens, interval, checkpoints);
}

Tensor wkv6_step(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state) {
    return step6(run6, r, log_w, k, v, u, state, CPU_INTERVAL_TOKENS);
}

auto wkv6_backward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u,
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor&, const Tensor& d_y,
                   const Tensor& d_final_state, int64_t interval, bool) {
    auto run = [](const Shape& shape, const Backward6& x) { over_heads(cpu_kernels().backward6, shape, x); };
    return backward6(run, r, log_w, k, v, u, checkpoints, cu_seqlens, d_y, d_final_state, interval);
}

auto wkv7_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                  const Tensor& state, const Tensor& cu_seqlens, const Tensor&, int64_t interval, bool, bool checkpoints) {
    return forward7(run7, r, log_w, k, v, kappa, a, state, cu_seqlens, interval, checkpoints);
}

Tensor wkv7_step(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                 const Tensor& state) {
    return step7(run7, r, log_w, k, v, kappa, a, state, CPU_INTERVAL_TOKENS);
}

auto wkv7_backward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor&, const Tensor& d_y,
                   const Tensor& d_final_state, int64_t interval, bool) {
    auto run = [](const Shape& shape, const Backward7& x) { over_heads(cpu_kernels().backward7, shape, x); };
    return backward7(run, r, log_w, k, v, kappa, a, checkpoints, cu_seqlens, d_y, d_final_state, interval);
}

}  // namespace

// `bounds` are cu_seqlens once more, on the inputs' device.
TORCH_LIBRARY(rwkv_wkv, library) {
    library.def(
        "wkv6_forward(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor u, Tensor state, Tensor cu_seqlens, "
        "Tensor bounds, int interval, bool chunked, bool checkpoints) -> (Tensor, Tensor, Tensor)");
    library.def(
        "wkv6_backward(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor u, Tensor checkpoints, Tensor cu_seqlens, "
        "Tensor bounds, Tensor d_y, Tensor d_final_state, int interval, bool chunked) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def("wkv6_step(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor u, Tensor(a!) state) -> Tensor");
    library.def(
        "wkv7_forward(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor kappa, Tensor a, Tensor state, Tensor cu_seqlens, "
        "Tensor bounds, int interval, bool chunked, bool checkpoints) -> (Tensor, Tensor, Tensor)");
    library.def(
        "wkv7_backward(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor kappa, Tensor a, Tensor checkpoints, Tensor cu_seqlens, "
        "Tensor bounds, Tensor d_y, Tensor d_final_state, int interval, bool chunked) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def("wkv7_step(Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor kappa, Tensor a, Tensor(a!) state) -> Tensor");
}

TORCH_LIBRARY_IMPL(rwkv_wkv, CPU, library) {
    library.impl("wkv6_forward", wkv6_forward);
    library.impl("wkv6_step", wkv6_step);
    library.impl("wkv6_backward", wkv6_backward);
    library.impl("wkv7_forward", wkv7_forward);
    library.impl("wkv7_step", wkv7_step);
    library.impl("wkv7_backward", wkv7_backward);
}

// On CUDA alone; PyTorch serves elsewhere (src/quantization/int8.py).
TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) {
    library.def("int8_product(Tensor x, Tensor codes, Tensor scales) -> Tensor");
    library.def("int8_dequantize(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor");
}
