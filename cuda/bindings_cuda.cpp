// torch.ops.rwkv_wkv on CUDA; the schemas are in bindings_cpu.cpp, which is loaded first.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#include <torch/library.h>

#include <cstdint>

#include "../cpu/bindings.h"
#include "../cpu/bindings_sample.h"
#include "cuda_kernels.h"

namespace {

using namespace wkv;

// Chunked blocks that a multiprocessor holds at once, by their shared memory and registers at heads of 64.
constexpr int BLOCKS_A_MULTIPROCESSOR = 2;

struct Launch {
    Shape shape;
    Stream stream;
    int blocks;
};

void check(int error) { TORCH_CHECK(error == 0, "wkv: ", cudaGetErrorString(static_cast<cudaError_t>(error))); }

void check_served(const Shape& shape, bool chunked) {
    TORCH_CHECK(shape.dtype != FLOAT64, "wkv: no float64 kernels on CUDA");
    TORCH_CHECK(chunked ? chunked_serves(shape) : shape.head_size <= LARGEST_HEAD, "wkv: no kernel for heads of ", shape.head_size);
}

Launch prepare(Shape shape, const Tensor& bounds, const Tensor& r, int64_t interval, bool chunked) {
    check_served(shape, chunked);
    TORCH_CHECK(interval == CUDA_INTERVAL, "wkv: checkpoints lie ", CUDA_INTERVAL, " tokens apart on CUDA");
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, r.device().index()));
    TORCH_CHECK(bounds.device() == r.device() && bounds.scalar_type() == at::kInt && bounds.is_contiguous()
                    && bounds.numel() == shape.n_sequences + 1, "wkv: bounds are cu_seqlens on ", r.device());
    shape.bounds = bounds.const_data_ptr<int>();
    return {shape, c10::cuda::getCurrentCUDAStream(r.device().index()), BLOCKS_A_MULTIPROCESSOR * multiprocessors};
}

Tensor scratch(const Tensor& r, size_t bytes) { return at::empty({static_cast<int64_t>(bytes)}, r.options().dtype(at::kByte)); }

// Kernels of v7 in chunks read 16 bytes at once; a contiguous slice may begin anywhere.
Tensor aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : x.clone(); }

auto wkv6_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state,
                  const Tensor& cu_seqlens, const Tensor& bounds, int64_t interval, bool chunked, bool checkpoints) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Forward6& x) {
        const Launch on = prepare(shape, bounds, r, interval, chunked);
        if (!chunked) return check(wkv6_sequential_forward(on.shape, x, on.stream));
        const Tensor extra = scratch(r, wkv6_chunked_forward_scratch(on.shape, on.blocks));
        check(wkv6_chunked_forward(on.shape, x, on.blocks, extra.data_ptr(), on.stream));
    };
    return forward6(run, r, log_w, k, v, u, state, cu_seqlens, interval, checkpoints);
}

Tensor wkv6_step(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state) {
    const c10::cuda::CUDAGuard guard(r.device());
    const Stream stream = c10::cuda::getCurrentCUDAStream(r.device().index());
    auto run = [&](const Shape& shape, const Forward6& x) {
        check_served(shape, false);
        check(wkv6_step_forward(shape, x, stream));
    };
    return step6(run, r, log_w, k, v, u, state, CUDA_INTERVAL);
}

auto wkv6_backward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u,
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor& bounds, const Tensor& d_y,
                   const Tensor& d_final_state, int64_t interval, bool chunked) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Backward6& x) {
        const Launch on = prepare(shape, bounds, r, interval, chunked);
        const size_t bytes = chunked ? wkv6_chunked_backward_scratch(on.shape, on.blocks) : wkv6_sequential_scratch(on.shape);
        const Tensor extra = scratch(r, bytes);
        check(chunked ? wkv6_chunked_backward(on.shape, x, on.blocks, extra.data_ptr(), on.stream)
                      : wkv6_sequential_backward(on.shape, x, extra.data_ptr(), on.stream));
    };
    return backward6(run, r, log_w, k, v, u, checkpoints, cu_seqlens, d_y, d_final_state, interval);
}

auto wkv7_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                  const Tensor& state, const Tensor& cu_seqlens, const Tensor& bounds, int64_t interval, bool chunked,
                  bool checkpoints) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Forward7& x) {
        const Launch on = prepare(shape, bounds, r, interval, chunked);
        if (!chunked) return check(wkv7_sequential_forward(on.shape, x, on.stream));
        const Tensor extra = scratch(r, wkv7_chunked_forward_scratch(on.shape, on.blocks));
        check(wkv7_chunked_forward(on.shape, x, on.blocks, extra.data_ptr(), on.stream));
    };
    return forward7(run, aligned(r), aligned(log_w), aligned(k), aligned(v), aligned(kappa), aligned(a), aligned(state), cu_seqlens,
                    interval, checkpoints);
}

Tensor wkv7_step(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                 const Tensor& state) {
    const c10::cuda::CUDAGuard guard(r.device());
    const Stream stream = c10::cuda::getCurrentCUDAStream(r.device().index());
    auto run = [&](const Shape& shape, const Forward7& x) {
        check_served(shape, false);
        check(wkv7_step_forward(shape, x, stream));
    };
    return step7(run, r, log_w, k, v, kappa, a, state, CUDA_INTERVAL);
}

auto wkv7_backward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor& bounds, const Tensor& d_y,
                   const Tensor& d_final_state, int64_t interval, bool chunked) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Backward7& x) {
        const Launch on = prepare(shape, bounds, r, interval, chunked);
        const size_t bytes = chunked ? wkv7_chunked_backward_scratch(on.shape, on.blocks) : wkv7_sequential_scratch(on.shape);
        const Tensor extra = scratch(r, bytes);
        check(chunked ? wkv7_chunked_backward(on.shape, x, on.blocks, extra.data_ptr(), on.stream)
                      : wkv7_sequential_backward(on.shape, x, extra.data_ptr(), on.stream));
    };
    return backward7(run, aligned(r), aligned(log_w), aligned(k), aligned(v), aligned(kappa), aligned(a), aligned(checkpoints),
                     cu_seqlens, aligned(d_y), aligned(d_final_state), interval);
}

void draw_rows(const Sample& x, at::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    check(sample(x, c10::cuda::getCurrentCUDAStream(device.index())));
}

}  // namespace

TORCH_LIBRARY_IMPL(rwkv_wkv, CUDA, library) {
    library.impl("wkv6_forward", wkv6_forward);
    library.impl("wkv6_step", wkv6_step);
    library.impl("wkv6_backward", wkv6_backward);
    library.impl("wkv7_forward", wkv7_forward);
    library.impl("wkv7_step", wkv7_step);
    library.impl("wkv7_backward", wkv7_backward);
    library.impl("decode_sample", decode_sample<draw_rows>);
}

namespace {

Int8Weight describe_int8(const Tensor& codes, const Tensor& scales, at::ScalarType dtype) {
    TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kChar && codes.is_contiguous(), "int8: codes are int8 [out, in]");
    TORCH_CHECK(scales.numel() == codes.size(0) && scales.scalar_type() == at::kFloat && scales.is_contiguous()
                    && scales.device() == codes.device(), "int8: scales are float32 [out, 1]");
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "int8: no kernel for ", dtype);
    return {codes.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(), static_cast<int>(codes.size(0)),
            static_cast<int>(codes.size(1)), dtype == at::kFloat ? int{FLOAT32} : dtype == at::kHalf ? FLOAT16 : int{BFLOAT16}};
}

Tensor int8_product_cuda(const Tensor& x, const Tensor& codes, const Tensor& scales) {
    const c10::cuda::CUDAGuard guard(codes.device());
    const Tensor inputs = aligned(x.contiguous()), weights = aligned(codes);
    const Int8Weight w = describe_int8(weights, scales, x.scalar_type());
    TORCH_CHECK(x.dim() == 2 && x.size(1) == w.in && w.in > 0 && w.in % INT8_PIECE == 0 && x.device() == codes.device(),
                "int8: x is [rows, in], in a multiple of ", INT8_PIECE);
    TORCH_CHECK(x.numel() <= INT32_MAX, "int8: too many rows");
    Tensor y = at::empty({x.size(0), w.out}, x.options());
    if (y.numel() == 0) return y;
    check(int8_product(w, inputs.const_data_ptr(), static_cast<int>(x.size(0)), y.data_ptr(),
                       c10::cuda::getCurrentCUDAStream(codes.device().index())));
    return y;
}

Tensor int8_dequantize_cuda(const Tensor& codes, const Tensor& scales, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(codes.device());
    Tensor weight = at::empty(codes.sizes(), codes.options().dtype(dtype));
    if (weight.numel() == 0) return weight;
    check(int8_dequantize(describe_int8(codes, scales, dtype), weight.data_ptr(),
                          c10::cuda::getCurrentCUDAStream(codes.device().index())));
    return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwkv_wkv, CUDA, library) {
    library.impl("int8_product", int8_product_cuda);
    library.impl("int8_dequantize", int8_dequantize_cuda);
}
