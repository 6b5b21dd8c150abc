// Matrix products of small tiles in shared memory, on the tensor cores: everything that is not plain CUDA is in here.
//
// Operands are float32. EXACT splits each into two TF32 numbers and adds three products (error near float32's); without it
// one TF32 product is taken (11 bits of mantissa, finer than bfloat16 inputs), of operands that are rounded on their way in unless
// they come as Rounded. On the host and under HIP the plain twin runs, which rounds in the same way.
#pragma once

#include "device.cuh"

namespace wkv {

// Element (i, j) is at[i * row + j * column].
struct View {
    const float* at;
    int row, column;
    __device__ __forceinline__ View transposed() const { return {at, column, row}; }
    __device__ __forceinline__ View from(int i, int j) const { return {at + i * row + j * column, row, column}; }
    __device__ __forceinline__ float operator()(int i, int j) const { return at[i * row + j * column]; }
};

// A View of numbers that TF32 holds already where products are not EXACT: bfloat16 inputs, and what `round_tf32` made.
struct Rounded {
    View view;
    __device__ __forceinline__ Rounded transposed() const { return {view.transposed()}; }
    __device__ __forceinline__ Rounded from(int i, int j) const { return {view.from(i, j)}; }
    __device__ __forceinline__ float operator()(int i, int j) const { return view(i, j); }
};

// Which element of a 16 x 8 tile the lane's c[e] is.
__device__ __forceinline__ int tile_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
__device__ __forceinline__ int tile_column(int lane, int e) { return 2 * (lane % 4) + e % 2; }

#if !defined(WKV_ON_HOST) && !defined(__HIP_PLATFORM_AMD__)
#define WKV_TENSOR_CORES
#endif

// To nearest, ties away from zero; infinities stay, and so do NaN (but for payloads below TF32's, which no arithmetic makes).
__device__ __forceinline__ float round_tf32(float x) {
    unsigned bits;
#ifdef WKV_TENSOR_CORES
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    bits = (bits + (finite ? 0x1000u : 0u)) & ~0x1fffu;
#endif
    return __uint_as_float(bits);
}

template <bool EXACT>
__device__ __forceinline__ float as_operand(const View&, float x) { return round_tf32(x); }
template <bool EXACT>
__device__ __forceinline__ float as_operand(const Rounded&, float x) { return EXACT ? round_tf32(x) : x; }

#ifdef WKV_TENSOR_CORES
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// c [16 x 8, spread over the warp] += a [16 x 8] b [8 x 8]; all 32 lanes call it. A and B are View or Rounded.
template <bool EXACT, class A, class B>
__device__ __forceinline__ void tile_product(float (&c)[4], A a, B b) {
    int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
    float x[4], y[2], x_high[4], y_high[2];
    for (int e = 0; e < 4; e++) x[e] = a(group + 8 * (e % 2), in_group + 4 * (e / 2));
    for (int e = 0; e < 2; e++) y[e] = b(in_group + 4 * e, group);
    for (int e = 0; e < 4; e++) x_high[e] = as_operand<EXACT>(a, x[e]);
    for (int e = 0; e < 2; e++) y_high[e] = as_operand<EXACT>(b, y[e]);
    if (EXACT) {
        for (int e = 0; e < 4; e++) x[e] = round_tf32(x[e] - x_high[e]);
        for (int e = 0; e < 2; e++) y[e] = round_tf32(y[e] - y_high[e]);
        mma_tf32(c, x, y_high);
        mma_tf32(c, x_high, y);
    }
    mma_tf32(c, x_high, y_high);
}
#else
template <bool EXACT, class A, class B>
__device__ __forceinline__ void tile_product(float (&c)[4], A a, B b) {
    int lane = threadIdx.x % 32;
    for (int e = 0; e < 4; e++)
        for (int k = 0; k < 8; k++) {
            float x = a(tile_row(lane, e), k), y = b(k, tile_column(lane, e));
            float x_high = as_operand<EXACT>(a, x), y_high = as_operand<EXACT>(b, y);
            if (EXACT) c[e] += round_tf32(x - x_high) * y_high + x_high * round_tf32(y - y_high);
            c[e] += x_high * y_high;
        }
}
#endif

// out(i, j, sum_k a(i, k) b(k, j)) for every element of an M x N product, by the whole block, whose threads are a multiple
// of 32. M is a multiple of 16, N and K of 8. No barrier inside, neither before nor after; `out` must not change a or b.
template <int M, int N, int K, bool EXACT, class A, class B, class Out>
__device__ __forceinline__ void product(A a, B b, Out out) {
    static_assert(M % 16 == 0 && N % 8 == 0 && K % 8 == 0, "whole tiles only");
    // Columns that a warp takes at once: the tile of `a` is read once for all of them.
    constexpr int WIDE = N % 16 == 0 ? 2 : 1;
    int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    for (int tile = threadIdx.x / 32; tile < (M / 16) * (N / (8 * WIDE)); tile += n_warps) {
        int i = tile % (M / 16) * 16, j = tile / (M / 16) * 8 * WIDE;
        float c[WIDE][4] = {};
        WKV_UNROLL
        for (int k = 0; k < K; k += 8)
            WKV_UNROLL
            for (int n = 0; n < WIDE; n++) tile_product<EXACT>(c[n], a.from(i, k), b.from(k, j + 8 * n));
        WKV_UNROLL
        for (int n = 0; n < WIDE; n++)
            WKV_UNROLL
            for (int e = 0; e < 4; e++) out(i + tile_row(lane, e), j + 8 * n + tile_column(lane, e), c[n][e]);
    }
}

}  // namespace wkv
