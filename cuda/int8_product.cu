// y = (x codes^T) scales for few rows of x, and the weight codes scales itself, rounded once.
//
// The product reads each code once for every 8 rows of x, 16 to a load. A block owns OUTPUTS rows of the weight; its warps take
// turns along `in`, each lane 16 codes of all OUTPUTS rows at a time, for which it reads x once. x stays in the first-level cache.
// Sums are float32, over lanes by shuffles and over warps by shared memory, in an order that only the shape decides.
#include "cuda_kernels.h"
#include "half.cuh"

namespace wkv {
namespace {

constexpr int OUTPUTS = 4, WARPS = 4, LANES = 32, ROWS_AT_ONCE = 8, THREADS = WARPS * LANES;

struct alignas(16) Piece {
    unsigned words[4];
};

__device__ __forceinline__ Piece load(const void* at) {
    const float4 x = *static_cast<const float4*>(at);
    return {{__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)}};
}

// The code in byte `i` of a word: 128 more than it are the last bits of 2^23 + 128 + code.
__device__ __forceinline__ float code(unsigned word, int i) {
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440u + i)) - 8388736.0f;
}

// 16 / sizeof(T) elements from one load.
__device__ __forceinline__ void unpack(const Piece& piece, const float*, float* to) {
    WKV_UNROLL
    for (int i = 0; i < 4; i++) to[i] = __uint_as_float(piece.words[i]);
}
template <class T>
__device__ __forceinline__ void unpack(const Piece& piece, const T*, float* to) {
    WKV_UNROLL
    for (int i = 0; i < 4; i++) {
        to[2 * i] = to_float(T{static_cast<unsigned short>(piece.words[i])});
        to[2 * i + 1] = to_float(T{static_cast<unsigned short>(piece.words[i] >> 16)});
    }
}

template <class T>
__device__ __forceinline__ void load_piece(const T* x, float* to) {
    constexpr int ELEMENTS = 16 / sizeof(T);
    WKV_UNROLL
    for (int i = 0; i < INT8_PIECE; i += ELEMENTS) unpack(load(x + i), x, to + i);
}

// Blocks that a multiprocessor is to hold: as many as leave their registers room for the loads of all their rows at once.
constexpr int blocks_held(int rows) { return rows == 1 ? 6 : rows == 2 ? 5 : rows == 4 ? 4 : 3; }

template <int ROWS, class T>
__global__ void __launch_bounds__(THREADS, blocks_held(ROWS))
multiply(Int8Weight w, const T* __restrict__ x, int rows, T* __restrict__ y) {
    WKV_SHARED(sums);  // [WARPS][OUTPUTS][ROWS]
    const int thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const int output = blockIdx.x * OUTPUTS, row = blockIdx.y * ROWS;
    const signed char* codes[OUTPUTS];
    int first[ROWS];
    // What lies behind the last row is computed from the last one and not stored.
    WKV_UNROLL
    for (int o = 0; o < OUTPUTS; o++) codes[o] = w.codes + static_cast<long long>(min(output + o, w.out - 1)) * w.in;
    WKV_UNROLL
    for (int m = 0; m < ROWS; m++) first[m] = min(row + m, rows - 1) * w.in;
    float sum[OUTPUTS][ROWS] = {};
    for (int k = thread * INT8_PIECE; k < w.in; k += THREADS * INT8_PIECE) {
        Piece pieces[OUTPUTS];
        WKV_UNROLL
        for (int o = 0; o < OUTPUTS; o++) pieces[o] = load(codes[o] + k);
        WKV_UNROLL
        for (int m = 0; m < ROWS; m++) {
            float piece[INT8_PIECE];
            load_piece(x + first[m] + k, piece);
            WKV_UNROLL
            for (int o = 0; o < OUTPUTS; o++)
                WKV_UNROLL
                for (int i = 0; i < INT8_PIECE; i++) sum[o][m] += code(pieces[o].words[i / 4], i % 4) * piece[i];
        }
    }
    WKV_UNROLL
    for (int o = 0; o < OUTPUTS; o++)
        WKV_UNROLL
        for (int m = 0; m < ROWS; m++) {
            WKV_UNROLL
            for (int other = LANES / 2; other; other /= 2) sum[o][m] += __shfl_xor_sync(0xffffffffu, sum[o][m], other);
            if (lane == 0) sums[(warp * OUTPUTS + o) * ROWS + m] = sum[o][m];
        }
    __syncthreads();
    const int o = thread / ROWS, m = thread % ROWS;
    if (o >= OUTPUTS || output + o >= w.out || row + m >= rows) return;
    float total = 0;
    for (int from = 0; from < WARPS; from++) total += sums[(from * OUTPUTS + o) * ROWS + m];
    store(y + static_cast<long long>(row + m) * w.out + output + o, total * w.scales[output + o]);
}

// A block a row of the weight. WIDE: 16 bytes to a store, which rows of `in` elements must allow.
template <bool WIDE, class T>
__global__ void __launch_bounds__(THREADS) write_weight(Int8Weight w, T* __restrict__ weight) {
    constexpr int ELEMENTS = WIDE ? 16 / sizeof(T) : 1;
    const long long first = static_cast<long long>(blockIdx.x) * w.in;
    const float scale = w.scales[blockIdx.x];
    WKV_UNROLL
    for (int k = threadIdx.x * ELEMENTS; k < w.in; k += THREADS * ELEMENTS) {
        struct alignas(ELEMENTS) Codes { signed char x[ELEMENTS]; };
        struct alignas(ELEMENTS * sizeof(T)) Weights { T x[ELEMENTS]; };
        const Codes codes = *reinterpret_cast<const Codes*>(w.codes + first + k);
        Weights weights;
        WKV_UNROLL
        for (int i = 0; i < ELEMENTS; i++) store(&weights.x[i], static_cast<float>(codes.x[i]) * scale);
        *reinterpret_cast<Weights*>(weight + first + k) = weights;
    }
}

template <class F>
int by_dtype(int dtype, F f) {
    return dtype == BFLOAT16 ? f(bf16{}) : dtype == FLOAT16 ? f(fp16{}) : f(float{});
}

template <int ROWS, class T>
int launch_multiply(const Int8Weight& w, const T* x, int rows, T* y, Stream stream) {
    const dim3 grid((w.out + OUTPUTS - 1) / OUTPUTS, (rows + ROWS - 1) / ROWS);
    return launch(multiply<ROWS, T>, grid, THREADS, sizeof(float) * WARPS * OUTPUTS * ROWS, stream, w, x, rows, y);
}

}  // namespace

int int8_product(const Int8Weight& w, const void* x, int rows, void* y, Stream stream) {
    return by_dtype(w.dtype, [&](auto element) {
        using T = decltype(element);
        auto run = [&](auto at_once) {
            return launch_multiply<decltype(at_once)::value>(w, static_cast<const T*>(x), rows, static_cast<T*>(y), stream);
        };
        if (rows == 1) return run(std::integral_constant<int, 1>());
        if (rows == 2) return run(std::integral_constant<int, 2>());
        if (rows <= 4) return run(std::integral_constant<int, 4>());
        return run(std::integral_constant<int, ROWS_AT_ONCE>());
    });
}

int int8_dequantize(const Int8Weight& w, void* weight, Stream stream) {
    return by_dtype(w.dtype, [&](auto element) {
        using T = decltype(element);
        const int bytes = 16, elements = bytes / static_cast<int>(sizeof(T));
        const bool wide = w.in % elements == 0 && reinterpret_cast<size_t>(w.codes) % elements == 0
                          && reinterpret_cast<size_t>(weight) % bytes == 0;
        return launch(wide ? write_weight<true, T> : write_weight<false, T>, dim3(w.out), THREADS, size_t{0}, stream, w,
                      static_cast<T*>(weight));
    });
}

}  // namespace wkv
