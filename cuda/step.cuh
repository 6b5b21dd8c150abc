// What the kernels that decode share: one token for each sequence, every state read and written once, 16 bytes a lane.
//
// A warp owns a part of one head that knows nothing of the others (rows of v7's state, columns of v6's), so that nothing waits
// for another warp and a state may move on in place. Its lanes form groups side by side: a group reads up to STEP_ROWS rows,
// all before it uses the first. Heads that are no whole number of lanes, and tensors that 16 bytes don't divide, go element by element.
#pragma once

#include <initializer_list>

#include "cuda_kernels.h"
#include "device.cuh"

namespace wkv {

constexpr int STEP_ROWS = 8, STEP_THREADS = 128;
// Fewer warps than that take a block each, and so spread over more multiprocessors.
constexpr long FEW_WARPS = 1024;

// Neighbouring elements that one instruction loads or stores, or two.
template <class E, int COUNT>
struct alignas(sizeof(E) * COUNT < 16 ? sizeof(E) * COUNT : 16) Neighbours {
    E at[COUNT];
};

// The elements from `first` on of n; zeros behind them. WHOLE: all are there, and well aligned.
template <bool WHOLE, class E, int COUNT>
__device__ __forceinline__ void take(const E* from, int first, int n, float (&to)[COUNT]) {
    if (WHOLE) {
        const Neighbours<E, COUNT> x = *reinterpret_cast<const Neighbours<E, COUNT>*>(from + first);
        WKV_UNROLL
        for (int i = 0; i < COUNT; i++) to[i] = to_float(x.at[i]);
    } else {
        WKV_UNROLL
        for (int i = 0; i < COUNT; i++) to[i] = first + i < n ? to_float(from[first + i]) : 0.0f;
    }
}

template <bool WHOLE, class E, int COUNT>
__device__ __forceinline__ void give(E* to, int first, int n, const float (&from)[COUNT]) {
    if (WHOLE) {
        Neighbours<E, COUNT> x;
        WKV_UNROLL
        for (int i = 0; i < COUNT; i++) store(&x.at[i], from[i]);
        constexpr int PIECES = sizeof(x) / sizeof(float4);
        WKV_UNROLL
        for (int i = 0; i < PIECES; i++) store_whole(reinterpret_cast<float4*>(to + first) + i, reinterpret_cast<const float4*>(&x)[i]);
        if (PIECES == 0) *reinterpret_cast<Neighbours<E, COUNT>*>(to + first) = x;
    } else {
        WKV_UNROLL
        for (int i = 0; i < COUNT; i++)
            if (first + i < n) store(to + first + i, from[i]);
    }
}

// Sums over the lanes whose numbers differ in the bits from FIRST to below LAST; all lanes get them.
template <int FIRST, int LAST, int COUNT>
__device__ __forceinline__ void sum_over_lanes(float (&x)[COUNT]) {
    WKV_UNROLL
    for (int other = FIRST; other < LAST; other *= 2)
        WKV_UNROLL
        for (int i = 0; i < COUNT; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], other);
}

// The warp's share: heads are counted over all sequences, and so are their tokens' elements and states.
struct StepShare {
    int head, part;
    bool none;

    __device__ StepShare(const Shape& shape, int parts) {
        const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
        head = warp / parts, part = warp % parts;
        none = head >= shape.n_sequences * shape.n_head;
    }
};

template <class X>
int launch_step(void (*kernel)(Shape, X), const Shape& shape, int parts, const X& x, Stream stream) {
    const long warps = static_cast<long>(shape.n_sequences) * shape.n_head * parts;
    const int threads = warps < FEW_WARPS ? 32 : STEP_THREADS;
    return launch(kernel, dim3(static_cast<unsigned>((warps * 32 + threads - 1) / threads)), threads, 0, stream, shape, x);
}

// Calls f(padded head, an element, whether heads and tensors are whole).
template <class F>
int by_step_form(const Shape& shape, std::initializer_list<const void*> tensors, F f) {
    return by_width(shape, [&](auto width, auto element) {
        bool whole = shape.head_size == width();
        for (const void* tensor : tensors) whole = whole && reinterpret_cast<unsigned long long>(tensor) % 16 == 0;
        return whole ? f(width, element, std::true_type()) : f(width, element, std::false_type());
    });
}

}  // namespace wkv
