// What forward and backward of the chunked v7 kernels share. One head's state S[value][key], row by row (arXiv:2503.14456):
//     S <- S diag(w_t) + (S z_t) b_t^T + v_t k_t^T,   y_t = S r_t,   z = -kappa, b = kappa * a
//
// In chunks of 16 tokens, with A_t the sum of log w up to and including t, S before the chunk, and
//     Q = [z_t e^{A_{t-1}}; r_t e^{A_t}],   K = [b_t e^{-A_t}; k_t e^{-A_t}],   W = [u; v],   u_t = S_{t-1} z_t   (32 x N each)
// all is products of matrices: with P = Q K^T where the row sees the column (z strictly earlier tokens, r its own too),
//     u = (1 - P_zb)^{-1} (z S^T + P_zk v),   y = r S^T + P_r W,   S <- (S + W^T K) diag(e^{A_16}).
// log w >= -0.61, so e^{+-A} stays within e^{+-9.8}: no overflow, and relative rounding errors don't know of its size.
//
// A block has 2 N threads. Each of its warps owns 16 rows of the state and the same 16 columns of W: between Q, K, P, which
// all share, and its own rows a warp waits for no other. Outside of products a lane holds 8 columns of one token: of its
// warp's 16 columns, lanes 2 t and 2 t + 1 hold token t's, so that sums over a chunk's tokens are shuffles.
#pragma once

#include "segments.cuh"

namespace wkv {
namespace wkv7 {

constexpr int BOTH = 2 * CHUNK;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Place {
    int warp, lane, token, column;
    __device__ __forceinline__ Place()
        : warp(threadIdx.x / 32), lane(threadIdx.x % 32), token(lane / 2), column(16 * warp + 8 * (lane % 2)) {}
};

// Eight neighbouring elements, in 16 bytes or 32.
template <class E>
struct Eight {
    float4 part[sizeof(E) / 2];
};

template <class E>
__device__ __forceinline__ Eight<E> load8(const void* at, size_t index, bool inside) {
    Eight<E> x;
    const float4* from = reinterpret_cast<const float4*>(static_cast<const E*>(at) + index);
    WKV_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(E) / 2); i++) x.part[i] = inside ? from[i] : float4{0.0f, 0.0f, 0.0f, 0.0f};
    return x;
}

__device__ __forceinline__ void unpack(const Eight<float>& x, float (&y)[8]) {
    WKV_UNROLL
    for (int i = 0; i < 2; i++) {
        y[4 * i] = x.part[i].x, y[4 * i + 1] = x.part[i].y;
        y[4 * i + 2] = x.part[i].z, y[4 * i + 3] = x.part[i].w;
    }
}

__device__ __forceinline__ void unpack(const Eight<bf16>& x, float (&y)[8]) {
    const float pairs[4] = {x.part[0].x, x.part[0].y, x.part[0].z, x.part[0].w};
    WKV_UNROLL
    for (int i = 0; i < 4; i++) {
        y[2 * i] = __uint_as_float(__float_as_uint(pairs[i]) << 16);
        y[2 * i + 1] = __uint_as_float(__float_as_uint(pairs[i]) & 0xffff0000u);
    }
}

__device__ __forceinline__ void store8(float* at, const float (&x)[8]) {
    reinterpret_cast<float4*>(at)[0] = float4{x[0], x[1], x[2], x[3]};
    reinterpret_cast<float4*>(at)[1] = float4{x[4], x[5], x[6], x[7]};
}

__device__ __forceinline__ void store8(bf16* at, const float (&x)[8]) {
    float pairs[4];
    WKV_UNROLL
    for (int i = 0; i < 4; i++) {
        bf16 low, high;
        store(&low, x[2 * i]);
        store(&high, x[2 * i + 1]);
        pairs[i] = __uint_as_float(low.bits | static_cast<unsigned>(high.bits) << 16);
    }
    *reinterpret_cast<float4*>(at) = float4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ void read8(const float* at, float (&x)[8]) { unpack(load8<float>(at, 0, true), x); }

// Sums over the tokens of a chunk, for each of the lane's columns: up to and including the lane's token, or from it on.
template <bool FROM_HERE>
__device__ __forceinline__ void running_sum(float (&x)[8], const Place& place) {
    WKV_UNROLL
    for (int step = 1; step < CHUNK; step *= 2)
        WKV_UNROLL
        for (int i = 0; i < 8; i++) {
            float other = __shfl_sync(ALL_LANES, x[i], (FROM_HERE ? place.lane + 2 * step : place.lane - 2 * step) & 31);
            if (FROM_HERE ? place.token + step < CHUNK : place.token >= step) x[i] += other;
        }
}

// c += a b for this warp: c is [16 x 8 COLUMNS], or two of them for 32 rows of a.
template <int K, bool EXACT, int COLUMNS, class A, class B>
__device__ __forceinline__ void accumulate(float (&c)[COLUMNS][4], A a, B b) {
    WKV_UNROLL
    for (int k = 0; k < K; k += 8)
        WKV_UNROLL
        for (int j = 0; j < COLUMNS; j++) tile_product<EXACT>(c[j], a.from(0, k), b.from(k, 8 * j));
}

template <int K, bool EXACT, int COLUMNS, class A, class B>
__device__ __forceinline__ void accumulate(float (&c)[2][COLUMNS][4], A a, B b) {
    WKV_UNROLL
    for (int k = 0; k < K; k += 8)
        WKV_UNROLL
        for (int i = 0; i < 2; i++)
            WKV_UNROLL
            for (int j = 0; j < COLUMNS; j++) tile_product<EXACT>(c[i][j], a.from(16 * i, k), b.from(k, 8 * j));
}

// use(row, column, element) for the elements of c that this lane holds.
template <int COLUMNS, class Use>
__device__ __forceinline__ void each(const float (&c)[COLUMNS][4], Use use) {
    int lane = threadIdx.x % 32;
    WKV_UNROLL
    for (int j = 0; j < COLUMNS; j++)
        WKV_UNROLL
        for (int e = 0; e < 4; e++) use(tile_row(lane, e), 8 * j + tile_column(lane, e), c[j][e]);
}

template <int COLUMNS>
__device__ __forceinline__ void put(const float (&c)[COLUMNS][4], float* at, int row) {
    each(c, [&](int i, int j, float x) { at[i * row + j] = x; });
}

// A block's shared memory. Rows of N + 4 floats suit operands read along rows, N + 8 such read down columns.
template <int N, int KEYS_ROW>
struct Memory {
    static constexpr int ROW = N + 4, P_ROW = BOTH + 4;
    static constexpr int FLOATS = N * ROW + BOTH * ROW + 2 * BOTH * KEYS_ROW + BOTH * P_ROW + N;
    // S [N][ROW], Q [32][ROW], K and W [32][KEYS_ROW], P [32][P_ROW], e^{A_16} [N]
    float *state, *queries, *keys, *values, *scores, *decay;

    __device__ __forceinline__ explicit Memory(float* at)
        : state(at), queries(state + N * ROW), keys(queries + BOTH * ROW), values(keys + BOTH * KEYS_ROW),
          scores(values + BOTH * KEYS_ROW), decay(scores + BOTH * P_ROW) {}
    __device__ __forceinline__ View s() const { return {state, ROW, 1}; }
    __device__ __forceinline__ Rounded q() const { return {{queries, ROW, 1}}; }
    __device__ __forceinline__ Rounded k() const { return {{keys, KEYS_ROW, 1}}; }
    __device__ __forceinline__ View w() const { return {values, KEYS_ROW, 1}; }
    __device__ __forceinline__ Rounded v() const { return {w().from(CHUNK, 0)}; }
    __device__ __forceinline__ View p() const { return {scores, P_ROW, 1}; }
};

// One token's inputs, 8 columns of them, as they come from global memory: read ahead while the chunk before is computed.
template <class E>
struct Token {
    Eight<E> r, k, v, kappa, a;
    Eight<float> log_w;

    template <class X>
    __device__ __forceinline__ void load(const X& x, size_t index, bool inside, bool with_values = true) {
        log_w = load8<float>(x.log_w, index, inside);
        r = load8<E>(x.r, index, inside);
        k = load8<E>(x.k, index, inside);
        v = load8<E>(x.v, index, inside && with_values);
        kappa = load8<E>(x.kappa, index, inside);
        a = load8<E>(x.a, index, inside);
    }
};

template <bool EXACT>
__device__ __forceinline__ float operand(float x) {
    // Rounded once for all products: what cancels in the gradient of log w then cancels exactly.
    return EXACT ? x : round_tf32(x);
}

template <bool EXACT>
__device__ __forceinline__ float exponential(float x) {
    return EXACT ? expf(x) : __expf(x);
}

// e^{A_t} and e^{A_16} of the lane's token and columns.
struct Growth {
    float here[8], last[8];
};

// Writes Q, K, v and the decay. FROM_END measures A from the chunk's end, so that S is to be multiplied by the decay before the
// chunk rather than after it. Padding comes as zeros and leaves everything as it is.
template <bool EXACT, bool FROM_END, class E, int N, int KEYS_ROW>
__device__ __forceinline__ Growth prepare(const Memory<N, KEYS_ROW>& m, const Token<E>& token, const Place& place) {
    float sum[8], r[8], k[8], v[8], kappa[8], a[8];
    unpack(token.log_w, sum), unpack(token.r, r), unpack(token.k, k);
    unpack(token.v, v), unpack(token.kappa, kappa), unpack(token.a, a);
    running_sum<false>(sum, place);
    Growth growth;
    float z[8], b[8];
    WKV_UNROLL
    for (int i = 0; i < 8; i++) {
        const float before = __shfl_sync(ALL_LANES, sum[i], (place.lane - 2) & 31);
        const float last = __shfl_sync(ALL_LANES, sum[i], 30 + place.lane % 2);
        const float origin = FROM_END ? last : 0.0f, inverse = exponential<EXACT>(origin - sum[i]);
        growth.here[i] = exponential<EXACT>(sum[i] - origin);
        growth.last[i] = exponential<EXACT>(last);
        z[i] = operand<EXACT>(-kappa[i] * exponential<EXACT>((place.token > 0 ? before : 0.0f) - origin));
        r[i] = operand<EXACT>(r[i] * growth.here[i]);
        b[i] = operand<EXACT>(kappa[i] * a[i] * inverse);
        k[i] = operand<EXACT>(k[i] * inverse);
    }
    store8(m.queries + place.token * m.ROW + place.column, z);
    store8(m.queries + (CHUNK + place.token) * m.ROW + place.column, r);
    store8(m.keys + place.token * KEYS_ROW + place.column, b);
    store8(m.keys + (CHUNK + place.token) * KEYS_ROW + place.column, k);
    store8(m.values + (CHUNK + place.token) * KEYS_ROW + place.column, v);
    if (place.token == CHUNK - 1) store8(m.decay + place.column, growth.last);
    return growth;
}

// out = a b where the row sees the column, else 0, by the whole block: P = Q K^T, and P's gradient.
template <bool EXACT, int N, class A, class B>
__device__ __forceinline__ void causal_product(A a, B b, float* out, int row, const Place& place) {
    constexpr int ACROSS = N / 32, COLUMNS = 4 / ACROSS;  // warps side by side, and each one's tiles
    int i = place.warp / ACROSS * 16, j = place.warp % ACROSS * 8 * COLUMNS;
    float c[COLUMNS][4] = {};
    accumulate<N, EXACT>(c, a.from(i, 0), b.from(0, j));
    each(c, [&](int t, int s, float x) { out[(i + t) * row + j + s] = (j + s) % CHUNK < t + i / CHUNK ? x : 0.0f; });
}

// x <- (1 - P_zb)^{-1} x, or its transpose's inverse, for the warp's 16 columns, x[16][row], a lane a column.
template <bool TRANSPOSED>
__device__ __forceinline__ void solve(const float* scores, int scores_row, float* at, int row, const Place& place) {
    __syncwarp();
    if (place.lane < CHUNK) {
        float x[CHUNK];
        WKV_UNROLL
        for (int t = 0; t < CHUNK; t++) x[t] = at[t * row + place.lane];
        // P_zb is 0 on and above its diagonal, so four columns of it may be taken at once.
        if (TRANSPOSED) {
            WKV_UNROLL
            for (int t = CHUNK - 1; t > 0; t--)
                WKV_UNROLL
                for (int s = 0; s < t; s += 4) {
                    float4 p = *reinterpret_cast<const float4*>(scores + t * scores_row + s);
                    float y = x[t];
                    x[s] += p.x * y, x[s + 1] += p.y * y, x[s + 2] += p.z * y, x[s + 3] += p.w * y;
                }
        } else {
            WKV_UNROLL
            for (int s = 0; s < CHUNK; s += 4)
                WKV_UNROLL
                for (int t = s + 1; t < CHUNK; t++) {
                    float4 p = *reinterpret_cast<const float4*>(scores + t * scores_row + s);
                    x[t] += p.x * x[s] + p.y * x[s + 1] + p.z * x[s + 2] + p.w * x[s + 3];
                }
        }
        WKV_UNROLL
        for (int t = 0; t < CHUNK; t++) at[t * row + place.lane] = x[t];
    }
    __syncwarp();
}

// x += (rows of the warp: a^T) b, then times the decay; a [32][.] at the warp's columns, b [32][N].
template <bool EXACT, int N, class A, class B>
__device__ __forceinline__ void update(float* x, int row, A a, B b, const float* decay) {
    float c[N / 8][4] = {};
    accumulate<BOTH, EXACT>(c, a.transposed(), b);
    each(c, [&](int i, int j, float added) { x[i * row + j] = (x[i * row + j] + added) * decay[j]; });
}

enum Start { GIVEN, ZERO, IDENTITY };

// The warp's 16 rows of an N x N matrix between global memory (rows of N) and shared memory (rows of ROW).
template <int N>
__device__ __forceinline__ void load_rows(const float* global, float* shared, int row, Start start, const Place& place) {
    WKV_UNROLL
    for (int q = place.lane; q < 16 * N / 4; q += 32) {
        int i = 16 * place.warp + q / (N / 4), j = q % (N / 4) * 4;
        auto one = [&](int column) { return start == IDENTITY && i == column ? 1.0f : 0.0f; };
        float4 x = {one(j), one(j + 1), one(j + 2), one(j + 3)};
        if (start == GIVEN) x = *reinterpret_cast<const float4*>(global + i * N + j);
        *reinterpret_cast<float4*>(shared + i * row + j) = x;
    }
}

template <int N>
__device__ __forceinline__ void store_rows(const float* shared, int row, float* global, const Place& place) {
    WKV_UNROLL
    for (int q = place.lane; q < 16 * N / 4; q += 32) {
        int i = 16 * place.warp + q / (N / 4), j = q % (N / 4) * 4;
        *reinterpret_cast<float4*>(global + i * N + j) = *reinterpret_cast<const float4*>(shared + i * row + j);
    }
}

}  // namespace wkv7
}  // namespace wkv
