// The little that all CUDA kernels share: bfloat16 in and out, dynamic shared memory, one checked way to launch.
//
// With WKV_ON_HOST the same kernels are compiled by an ordinary C++ compiler and run on the CPU (host_shim.h), so that
// their arithmetic is tested where no GPU is. Kept to what hipify translates; what it can't (PTX) is in tile.cuh, with a plain twin.
#pragma once

#ifdef WKV_ON_HOST
#include "host_shim.h"
#else
#include <cuda_runtime.h>
#endif

#include <type_traits>

#include "../cpu/arguments.h"

namespace wkv {

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(bf16* at, float x) {
    unsigned bits = __float_as_uint(x);
    // To nearest, ties to even; a NaN stays one.
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    at->bits = static_cast<unsigned short>(bits >> 16);
}

// By one instruction; a plain assignment may be split into a store for each of the four.
__device__ __forceinline__ void store_whole(float4* at, float4 x) {
#if defined(WKV_ON_HOST) || defined(__HIP_PLATFORM_AMD__)
    *at = x;
#else
    __stwb(at, x);
#endif
}

#ifdef WKV_ON_HOST
#define WKV_UNROLL
#else
// Register arrays must be indexed by constants, so every loop over one is unrolled.
#define WKV_UNROLL _Pragma("unroll")
// `name` is the block's dynamic shared memory, as floats.
#define WKV_SHARED(name)                                       \
    extern __shared__ __align__(16) unsigned char wkv_shared[]; \
    float* name = reinterpret_cast<float*>(wkv_shared)

// Returns a cudaError_t as int, 0 for success; every launch of this project goes through here.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}
#endif

// Calls f(padded head, an element) as the shape asks; the first is a constant.
template <class F>
int by_width(const Shape& shape, F f) {
    auto with = [&](auto width) { return shape.dtype == BFLOAT16 ? f(width, bf16{}) : f(width, float{}); };
    if (shape.head_size <= 16) return with(std::integral_constant<int, 16>());
    if (shape.head_size <= 32) return with(std::integral_constant<int, 32>());
    if (shape.head_size <= 64) return with(std::integral_constant<int, 64>());
    return with(std::integral_constant<int, 128>());
}

}  // namespace wkv
