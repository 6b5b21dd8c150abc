// torch.ops.rwkv_wkv on CUDA; the schemas are in bindings_cpu.cpp, which is loaded first.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#include <torch/library.h>

#include <cstdint>

#include "bindings.h"
#include "bindings_sample.h"
#include "cuda_kernels.h"

namespace {

using namespace wkv;

// Chunked blocks that a multiprocessor holds at once, by their shared memory and registers at heads of 64.
constexpr int BLOCKS_A_MULTIPROCESSOR = 2;

struct Launch {
    Shape shape;
    Tensor bounds;  // kept until the kernels are enqueued; the allocator then knows the stream that still reads it
    Stream stream;
    int blocks;
};

void check(int error) { TORCH_CHECK(error == 0, "wkv: ", cudaGetErrorString(static_cast<cudaError_t>(error))); }

void check_served(const Shape& shape, bool chunked) {
    TORCH_CHECK(shape.dtype != FLOAT64, "wkv: no float64 kernels on CUDA");
    TORCH_CHECK(chunked ? chunked_serves(shape) : shape.head_size <= LARGEST_HEAD, "wkv: no kernel for heads of ", shape.head_size);
}

Launch prepare(const Shape& shape, const Tensor& cu_seqlens, const Tensor& r, int64_t interval, bool chunked) {
    check_served(shape, chunked);
    TORCH_CHECK(interval == CUDA_INTERVAL, "wkv: checkpoints lie ", CUDA_INTERVAL, " tokens apart on CUDA");
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, r.device().index()));
    Launch launch{shape, cu_seqlens.to(r.device(), /*non_blocking=*/true), c10::cuda::getCurrentCUDAStream(r.device().index()),
                  BLOCKS_A_MULTIPROCESSOR * multiprocessors};
    launch.shape.bounds = launch.bounds.const_data_ptr<int>();
    return launch;
}

Tensor scratch(const Tensor& r, size_t bytes) { return at::empty({static_cast<int64_t>(bytes)}, r.options().dtype(at::kByte)); }

// Kernels of v7 in chunks read 16 bytes at once; a contiguous slice may begin anywhere.
Tensor aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : x.clone(); }

auto wkv6_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state,
                  const Tensor& cu_seqlens, int64_t interval, bool chunked, bool checkpoints) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Forward6& x) {
        const Launch on = prepare(shape, cu_seqlens, r, interval, chunked);
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
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor& d_y, const Tensor& d_final_state,
                   int64_t interval, bool chunked) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Backward6& x) {
        const Launch on = prepare(shape, cu_seqlens, r, interval, chunked);
        const size_t bytes = chunked ? wkv6_chunked_backward_scratch(on.shape, on.blocks) : wkv6_sequential_scratch(on.shape);
        const Tensor extra = scratch(r, bytes);
        check(chunked ? wkv6_chunked_backward(on.shape, x, on.blocks, extra.data_ptr(), on.stream)
                      : wkv6_sequential_backward(on.shape, x, extra.data_ptr(), on.stream));
    };
    return backward6(run, r, log_w, k, v, u, checkpoints, cu_seqlens, d_y, d_final_state, interval);
}

auto wkv7_forward(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
                  const Tensor& state, const Tensor& cu_seqlens, int64_t interval, bool chunked, bool checkpoints) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Forward7& x) {
        const Launch on = prepare(shape, cu_seqlens, r, interval, chunked);
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
                   const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor& d_y, const Tensor& d_final_state,
                   int64_t interval, bool chunked) {
    const c10::cuda::CUDAGuard guard(r.device());
    auto run = [&](const Shape& shape, const Backward7& x) {
        const Launch on = prepare(shape, cu_seqlens, r, interval, chunked);
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
