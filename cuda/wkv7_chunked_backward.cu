// The gradients of wkv7_chunked_forward.cu, chunk by chunk from the end, with the gradient G of the state in shared memory.
// With A measured from the chunk's end, S the checkpoint times e^{A_16}, and D = [d_x; d_y] the gradients of what z and r see:
//     d_x = (1 - P_zb)^{-T} (P_rb^T d_y + b G^T),   d_v = P_k^T D + k G^T,   d_P = D W^T where the row sees the column,
//     d_Q = D S + d_P K,   d_K = W G + d_P^T Q,   G <- (G + D^T Q) diag(e^{A_16}),
//     d_log_w_t = sum_{s >= t} (r d_r - b d_b - k d_k)_s + sum_{s > t} (z d_z)_s + the columns' sums of G * S and of K * (W G).
// In the last line pairs of tokens that both come after t cancel: they are made from the very same rounded numbers.
#include "wkv7_chunked.cuh"

namespace wkv {
namespace wkv7 {
namespace {

// Blocks that a multiprocessor of 228 KB holds at heads of 64: float32's inputs take the registers of one.
template <class E>
constexpr int RESIDENT = std::is_same<E, float>::value ? 2 : 3;

template <int N>
struct BackwardMemory : Memory<N, N + 4> {
    static constexpr int ROW = N + 4;
    static constexpr int FLOATS = Memory<N, N + 4>::FLOATS + N * ROW + BOTH * ROW + N;
    float *gradient, *outputs, *ends;  // G [N][ROW], D [32][ROW], the columns' sums of G * S + K * (W G) [N]

    __device__ __forceinline__ explicit BackwardMemory(float* at)
        : Memory<N, N + 4>(at), gradient(at + Memory<N, N + 4>::FLOATS), outputs(gradient + N * ROW),
          ends(outputs + BOTH * ROW) {}
    __device__ __forceinline__ View g() const { return {gradient, ROW, 1}; }
    __device__ __forceinline__ View d() const { return {outputs, ROW, 1}; }
    __device__ __forceinline__ Rounded d_y() const { return {d().from(CHUNK, 0)}; }
};

// The warp's columns of a checkpoint, a lane its own columns of every 16th row: read ahead like the tokens.
template <int N>
struct State {
    Eight<float> row[N / CHUNK];

    __device__ __forceinline__ void load(const float* from, const Place& place) {
        WKV_UNROLL
        for (int i = 0; i < N / CHUNK; i++) row[i] = load8<float>(from, (CHUNK * i + place.token) * N + place.column, true);
    }
};

// Writes S and, of the sums at the chunk's end, those of G * S.
template <int N>
__device__ __forceinline__ void write_state(const BackwardMemory<N>& m, const State<N>& state, const float (&decay)[8],
                                            const Place& place) {
    float sums[8] = {};
    WKV_UNROLL
    for (int i = 0; i < N / CHUNK; i++) {
        const int at = (CHUNK * i + place.token) * m.ROW + place.column;
        float s[8], g[8];
        unpack(state.row[i], s);
        read8(m.gradient + at, g);
        WKV_UNROLL
        for (int j = 0; j < 8; j++) s[j] *= decay[j], sums[j] += s[j] * g[j];
        store8(m.state + at, s);
    }
    WKV_UNROLL
    for (int other = 2; other < 32; other *= 2)
        WKV_UNROLL
        for (int j = 0; j < 8; j++) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], other);
    if (place.token == 0) store8(m.ends + place.column, sums);
}

// From the warp's columns of b G^T to those of d_x, in D.
template <bool EXACT, int N>
__device__ __forceinline__ void solve_gradient(const BackwardMemory<N>& m, float (&d_u)[2][4], const Place& place) {
    const int own = 16 * place.warp;
    accumulate<CHUNK, EXACT>(d_u, m.p().from(CHUNK, 0).transposed(), m.d_y().from(0, own));
    put(d_u, m.outputs + own, m.ROW);
    solve<true>(m.scores, m.P_ROW, m.outputs + own, m.ROW, place);
}

// G before the chunk.
template <bool EXACT, int N>
__device__ __forceinline__ void update_gradient(const BackwardMemory<N>& m, const Place& place) {
    const int own = 16 * place.warp;
    update<EXACT, N>(m.gradient + own * m.ROW, m.ROW, m.d().from(0, own), m.q(), m.decay);
}

// Q, K, v, d_y, S and G are there. Takes G to before the chunk, and leaves d_Q in W's place, d_K in S's and d_v in that of d_x;
// the warp may read its columns of them.
template <bool EXACT, int N>
__device__ __forceinline__ void gradients(const BackwardMemory<N>& m, const Place& place) {
    constexpr int ROW = BackwardMemory<N>::ROW;
    const int own = 16 * place.warp;
    causal_product<EXACT, N>(m.q(), m.k().transposed(), m.scores, m.P_ROW, place);
    float right[2][4] = {}, d_values[2][2][4] = {};  // z S^T, then z's right-hand side; b G^T, and k G^T, then d_v
    accumulate<N, EXACT>(right, m.q(), m.s().transposed().from(0, own));
    accumulate<N, EXACT>(d_values, m.k(), m.g().transposed().from(0, own));
    __syncthreads();
    accumulate<CHUNK, EXACT>(right, m.p().from(0, CHUNK), m.v().from(0, own));
    put(right, m.values + own, ROW);
    solve<false>(m.scores, m.P_ROW, m.values + own, ROW, place);
    solve_gradient<EXACT>(m, d_values[0], place);
    accumulate<BOTH, EXACT>(d_values[1], m.p().from(0, CHUNK).transposed(), m.d().from(0, own));
    __syncthreads();
    // From here on the warp's columns are those of keys. d_P takes P's place.
    causal_product<EXACT, N>(m.d(), m.w().transposed(), m.scores, m.P_ROW, place);
    float d_q[2][2][4] = {}, d_k[2][2][4] = {};
    accumulate<N, EXACT>(d_q, m.d(), m.s().from(0, own));
    accumulate<N, EXACT>(d_k, m.w(), m.g().from(0, own));
    float ends[4] = {};
    WKV_UNROLL
    for (int half = 0; half < 2; half++)
        each(d_k[half], [&](int s, int j, float y) { ends[j / 8 * 2 + j % 2] += m.k()(CHUNK * half + s, own + j) * y; });
    WKV_UNROLL
    for (int other = 4; other < 32; other *= 2)
        WKV_UNROLL
        for (int j = 0; j < 4; j++) ends[j] += __shfl_xor_sync(ALL_LANES, ends[j], other);
    if (place.lane < 4) {
        WKV_UNROLL
        for (int j = 0; j < 4; j++) m.ends[own + j / 2 * 8 + 2 * place.lane + j % 2] += ends[j];
    }
    __syncthreads();
    accumulate<BOTH, EXACT>(d_q, m.p(), m.k().from(0, own));
    accumulate<BOTH, EXACT>(d_k, m.p().transposed(), m.q().from(0, own));
    update_gradient<EXACT>(m, place);
    __syncwarp();
    WKV_UNROLL
    for (int half = 0; half < 2; half++) {
        put(d_q[half], m.values + CHUNK * half * ROW + own, ROW);
        put(d_k[half], m.state + CHUNK * half * ROW + own, ROW);
    }
    put(d_values[1], m.outputs + own, ROW);
    __syncwarp();
}

// From what `gradients` left to those of the inputs.
template <class E, int N>
__device__ __forceinline__ void write_gradients(const BackwardMemory<N>& m, const Backward7& x, const float (&growth)[8],
                                                const Eight<E>& kappas, const Eight<E>& as, long at, bool inside,
                                                const Place& place) {
    const int first = place.token * m.ROW + place.column, second = first + CHUNK * m.ROW;
    float d_log_w[8], d_z[8], d_b[8], decay[8];
    read8(m.decay + place.column, decay);
    {
        float d_r[8], d_k[8], z[8], r[8], b[8], k[8];
        read8(m.values + first, d_z), read8(m.values + second, d_r);
        read8(m.state + first, d_b), read8(m.state + second, d_k);
        read8(m.queries + first, z), read8(m.queries + second, r);
        read8(m.keys + first, b), read8(m.keys + second, k);
        WKV_UNROLL
        for (int i = 0; i < 8; i++) {
            const float next = __shfl_sync(ALL_LANES, z[i] * d_z[i], (place.lane + 2) & 31);
            d_log_w[i] = r[i] * d_r[i] - k[i] * d_k[i] - b[i] * d_b[i] + (place.token < CHUNK - 1 ? next : 0.0f);
            const float before = __shfl_sync(ALL_LANES, growth[i], (place.lane - 2) & 31);
            d_z[i] *= place.token > 0 ? before : 1.0f / decay[i];
            d_r[i] *= growth[i];
            d_k[i] /= growth[i];
            d_b[i] /= growth[i];
        }
        if (inside) {
            store8(static_cast<E*>(x.d_r) + at, d_r);
            store8(static_cast<E*>(x.d_k) + at, d_k);
        }
    }
    running_sum<true>(d_log_w, place);
    if (!inside) return;
    float end[8], d_v[8], kappa[8], a[8], d_kappa[8], d_a[8];
    read8(m.ends + place.column, end), read8(m.outputs + first, d_v), unpack(kappas, kappa), unpack(as, a);
    WKV_UNROLL
    for (int i = 0; i < 8; i++) {
        d_log_w[i] += end[i];
        d_kappa[i] = d_b[i] * a[i] - d_z[i];
        d_a[i] = d_b[i] * kappa[i];
    }
    store8(static_cast<float*>(x.d_log_w) + at, d_log_w);
    store8(static_cast<E*>(x.d_v) + at, d_v);
    store8(static_cast<E*>(x.d_kappa) + at, d_kappa);
    store8(static_cast<E*>(x.d_a) + at, d_a);
}

// From `ends`, or the final state's gradient where that is null, to all gradients, or to `summaries`.
template <class E, int N, Walk WALK>
__global__ void __launch_bounds__(2 * N, RESIDENT<E>) backward(Shape shape, Backward7 x, Segments segments, const float* ends,
                                                                float* summaries) {
    constexpr bool EXACT = std::is_same<E, float>::value;
    constexpr int ROW = BackwardMemory<N>::ROW, STATES = N * N;
    WKV_SHARED(shared);
    const BackwardMemory<N> m(shared);
    const Part part(shape, segments);
    if (part.empty) return;
    const Place place;
    const int head = blockIdx.y, own = 16 * place.warp, chunks = (part.end - part.first + CHUNK - 1) / CHUNK;
    const bool identity = WALK == SUMMARY && blockIdx.z == 1;
    const long of_sequence = (static_cast<long>(part.sequence) * shape.n_head + head) * STATES;
    const long of_segment = (static_cast<long>(part.segment) * shape.n_head + head) * STATES;
    const float* end = ends ? ends + of_segment : static_cast<const float*>(x.d_final_state) + of_sequence;
    load_rows<N>(end, m.gradient, ROW, identity ? IDENTITY : WALK == SUMMARY ? ZERO : GIVEN, place);
    __syncthreads();

    const long stride = static_cast<long>(shape.n_head) * N;
    const int chunks_before = (part.first - shape.bounds[part.sequence]) / CHUNK;
    const long first_saved = first_checkpoint(shape.bounds, CHUNK, part.sequence) + chunks_before;
    Token<E> token;
    Eight<E> d_y = {};
    State<N> state;
    auto token_of = [&](int chunk) { return part.first + chunk * CHUNK + place.token; };
    auto where = [&](int chunk) { return token_of(chunk) * stride + static_cast<long>(head) * N + place.column; };
    auto inside = [&](int chunk) { return token_of(chunk) < part.end; };
    const float* saved = static_cast<const float*>(x.checkpoints) + (first_saved * shape.n_head + head) * STATES;
    auto read = [&](int chunk) {
        token.load(x, where(chunk), inside(chunk));
        d_y = load8<E>(x.d_y, where(chunk), inside(chunk) && !identity);
        if (WALK == ALL) state.load(saved + static_cast<long>(chunk) * shape.n_head * STATES, place);
    };
    if (chunks > 0) read(chunks - 1);
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const Growth growth = prepare<EXACT, true>(m, token, place);
        float y[8];
        unpack(d_y, y);
        store8(m.outputs + (CHUNK + place.token) * ROW + place.column, y);
        if (WALK == ALL) write_state(m, state, growth.last, place);
        __syncthreads();
        const Eight<E> kappa = token.kappa, a = token.a;
        if (chunk > 0) read(chunk - 1);
        if (WALK == ALL) {
            gradients<EXACT>(m, place);
            write_gradients(m, x, growth.here, kappa, a, where(chunk), inside(chunk), place);
        } else {
            causal_product<EXACT, N>(m.q(), m.k().transposed(), m.scores, m.P_ROW, place);
            float d_u[2][4] = {};
            accumulate<N, EXACT>(d_u, m.k(), m.g().transposed().from(0, own));
            __syncthreads();
            solve_gradient<EXACT>(m, d_u, place);
            update_gradient<EXACT>(m, place);
        }
        __syncthreads();
    }
    if (WALK == ALL && !part.opens) return;
    float* to = WALK == ALL ? static_cast<float*>(x.d_state) + of_sequence : summaries + 2 * of_segment + blockIdx.z * STATES;
    store_rows<N>(m.gradient, ROW, to, place);
}

template <class E, int N>
int run(const Shape& shape, const Backward7& x, const Segments& segments, float* scratch, Stream stream) {
    const size_t bytes = BackwardMemory<N>::FLOATS * sizeof(float);
    const dim3 grid(shape.n_sequences * segments.count, shape.n_head), heads(shape.n_sequences, shape.n_head);
    const float* ends = nullptr;
    if (segments.count > 1) {
        float* summaries = scratch;
        float* states = scratch + segment_floats(shape, segments) / 3 * 2;
        int error = launch(backward<E, N, SUMMARY>, dim3(grid.x, grid.y, 2), 2 * N, bytes, stream, shape, x, segments,
                           static_cast<const float*>(nullptr), summaries);
        if (error) return error;
        error = launch(pass_states<N, false>, heads, CHUNKED_THREADS, 3 * N * (N + 4) * sizeof(float), stream, shape, segments,
                       static_cast<const float*>(x.d_final_state), static_cast<const float*>(summaries), states, true);
        if (error) return error;
        ends = states;
    }
    return launch(backward<E, N, ALL>, grid, 2 * N, bytes, stream, shape, x, segments, ends, static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace wkv7

size_t wkv7_chunked_backward_scratch(const Shape& shape, int blocks) {
    return segment_floats(shape, cut(shape, blocks)) * sizeof(float);
}

int wkv7_chunked_backward(const Shape& shape, const Backward7& x, int blocks, void* scratch, Stream stream) {
    return by_head(shape, [&](auto n, auto element) {
        return wkv7::run<decltype(element), n()>(shape, x, cut(shape, blocks), static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
