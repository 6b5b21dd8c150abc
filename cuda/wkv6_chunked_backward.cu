// The gradients of wkv6_chunked_forward.cu, chunk by chunk from the end, with the gradient G of the state in shared memory.
// With d scores = tril(dy v^T), D_ts = prod_{s<q<t} w_q and e^{..} as in wkv6_chunked.cuh:
//     dr_t = e^{A_{t-1}} S dy_t + sum_{s<t} d scores_ts D_ts k_s + d scores_tt u k_t
//     dk_s = e^{A_16-A_s} G v_s + sum_{t>s} d scores_ts D_ts r_t + d scores_ss u r_s
//     dv = k_end G + scores^T dy,     G <- e^{A_16} G + r_start^T dy
// log w_q has a share in each product whose decay spans token q and in no other: they are summed as they are, since strong decays
// would drown in differences of sums.
#include "wkv6_chunked.cuh"

namespace wkv {
namespace {

template <int N>
struct Gradients6 {
    static constexpr int ROWS = Chunk6<N>::ROWS;
    float *g, *y, *v, *r_start, *k_end, *scores, *last;  // [N][LD], [16][LD] four times, [16][SCORES], [N]
    float *other_r, *other_w;                            // [16][LD]: the second half of the pairs

    __device__ explicit Gradients6(float* shared)
        : g(shared), y(g + Chunk6<N>::STATE), v(y + ROWS), r_start(v + ROWS), k_end(r_start + ROWS), scores(k_end + ROWS),
          last(scores + CHUNK * Chunk6<N>::SCORES), other_r(v), other_w(last + N) {}

    static constexpr int FLOATS = Chunk6<N>::STATE + 5 * ROWS + CHUNK * Chunk6<N>::SCORES + N;
};

// From `ends`, or the final state's gradient where that is null, to all gradients, or to `summaries`.
template <class E, int N, Walk WALK>
__global__ void __launch_bounds__(CHUNKED_THREADS) backward(Shape shape, Backward6 x, Segments segments, const float* ends,
                                                            float* summaries, float* d_u) {
    constexpr bool EXACT = std::is_same<E, float>::value;
    constexpr int LD = Chunk6<N>::LD, SCORES = Chunk6<N>::SCORES;
    static_assert(2 * N <= CHUNKED_THREADS, "two threads a key");
    WKV_SHARED(shared);
    Chunk6<N> chunk(shared);
    Gradients6<N> d(shared + Chunk6<N>::FLOATS);
    const Part part(shape, segments);
    if (part.empty) return;
    const int head = blockIdx.y, j = threadIdx.x % N, half = threadIdx.x / N;
    const bool with_d_y = WALK == ALL || blockIdx.z == 0;
    const long stride = static_cast<long>(shape.n_head) * N, states = N * N;
    const long of_sequence = (static_cast<long>(part.sequence) * shape.n_head + head) * states;
    const long of_segment = (static_cast<long>(part.segment) * shape.n_head + head) * states;
    const float* end = ends ? ends + of_segment : static_cast<const float*>(x.d_final_state) + of_sequence;
    for (int e = threadIdx.x; e < N * N; e += blockDim.x)
        d.g[e / N * LD + e % N] = WALK == ALL ? end[e] : blockIdx.z == 1 && e / N == e % N ? 1.0f : 0.0f;
    for (int e = threadIdx.x; e < N; e += blockDim.x) chunk.u[e] = static_cast<const float*>(x.u)[head * N + e];
    const long first_saved = first_checkpoint(shape.bounds, CHUNK, part.sequence);
    float own_d_u = 0.0f;
    for (int index = (part.end - part.first + CHUNK - 1) / CHUNK - 1; index >= 0; index--) {
        const int first = part.first + index * CHUNK, count = part.end - first < CHUNK ? part.end - first : CHUNK;
        const long at = first * stride + static_cast<long>(head) * N;
        __syncthreads();
        for (int e = threadIdx.x; e < CHUNK * N; e += blockDim.x) {
            const int t = e / N;
            d.y[t * LD + e % N] = t < count && with_d_y ? to_float(static_cast<const E*>(x.d_y)[at + t * stride + e % N]) : 0.0f;
        }
        if (WALK == ALL) {
            const long checkpoint = first_saved + (first - shape.bounds[part.sequence]) / CHUNK;
            const float* saved = static_cast<const float*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states;
            for (int e = threadIdx.x; e < N * N; e += blockDim.x) chunk.state[e / N * LD + e % N] = saved[e];
        }
        chunk.template load<E>(x, at, stride, count, true);
        if (WALK == ALL) {
            chunk.score();
            product<CHUNK, N, N, EXACT>(View{chunk.k_end, LD, 1}, View{d.g, LD, 1}, [&](int s, int i, float out) { d.v[s * LD + i] = out; });
            product<CHUNK, N, CHUNK, EXACT>(View{chunk.scores, 1, SCORES}, Rounded{{d.y, LD, 1}}, [&](int s, int i, float out) {
                if (s < count) store(static_cast<E*>(x.d_v) + at + s * stride + i, d.v[s * LD + i] + out);
            });
            product<CHUNK, N, N, EXACT>(Rounded{{chunk.v, LD, 1}}, View{d.g, 1, LD}, [&](int s, int j, float out) { d.k_end[s * LD + j] = out; });
            product<CHUNK, N, N, EXACT>(Rounded{{d.y, LD, 1}}, View{chunk.state, 1, LD},
                                        [&](int t, int j, float out) { d.r_start[t * LD + j] = out; });
            product<CHUNK, CHUNK, N, EXACT>(Rounded{{d.y, LD, 1}}, Rounded{{chunk.v, 1, LD}}, [&](int t, int s, float out) {
                d.scores[t * SCORES + s] = s <= t ? out : 0.0f;
            });
            for (int row = threadIdx.x; row < N; row += blockDim.x) {
                float sum = 0.0f;
                for (int i = 0; i < N; i++) sum += chunk.state[row * LD + i] * d.g[row * LD + i];
                d.last[row] = sum * chunk.last[row];
            }
            __syncthreads();
        }
        product<N, N, CHUNK, EXACT>(View{chunk.r_start, 1, LD}, Rounded{{d.y, LD, 1}}, [&](int j, int i, float out) {
            d.g[j * LD + i] = d.g[j * LD + i] * chunk.last[j] + out;
        });
        if (WALK == SUMMARY) continue;

        // Two threads a key, each with every other s of the pairs.
        float d_r[CHUNK] = {}, d_w[CHUNK] = {};
        if (half < 2)
            for (int s = half; s < CHUNK; s += 2) {
                const float k = chunk.k[s * LD + j];
                float decay[CHUNK], running = 1.0f, d_k = 0.0f, spanning = 0.0f;
                WKV_UNROLL
                for (int t = 1; t < CHUNK; t++) {
                    decay[t] = running;
                    if (t > s) running *= chunk.w[t * LD + j];
                }
                WKV_UNROLL
                for (int t = CHUNK - 1; t > 0; t--)
                    if (t > s) {
                        d_w[t] += spanning;
                        const float scaled = d.scores[t * SCORES + s] * decay[t], from_r = scaled * chunk.r[t * LD + j];
                        d_r[t] += scaled * k;
                        d_k += from_r;
                        spanning += from_r * k;
                    }
                if (s < count) {
                    d_k += d.scores[s * SCORES + s] * chunk.u[j] * chunk.r[s * LD + j];
                    const float through_end = d.k_end[s * LD + j] * chunk.to_end[s * LD + j];
                    store(static_cast<E*>(x.d_k) + at + s * stride + j, through_end + d_k);
                }
            }
        if (half == 1) {
            WKV_UNROLL
            for (int t = 0; t < CHUNK; t++) d.other_r[t * LD + j] = d_r[t], d.other_w[t * LD + j] = d_w[t];
        }
        __syncthreads();
        if (half == 0) {
            float spanning = d.last[j];
            WKV_UNROLL
            for (int t = CHUNK - 1; t >= 0; t--) {
                d_w[t] += d.other_w[t * LD + j] + spanning;
                spanning += d.r_start[t * LD + j] * chunk.r_start[t * LD + j];
            }
            spanning = 0.0f;
            WKV_UNROLL
            for (int t = 0; t < CHUNK; t++) {
                d_w[t] += spanning;
                spanning += d.k_end[t * LD + j] * chunk.k_end[t * LD + j];
                if (t < count) {
                    const float k = chunk.k[t * LD + j], diagonal = d.scores[t * SCORES + t];
                    const float through_start = d.r_start[t * LD + j] * chunk.from_start[t * LD + j];
                    static_cast<float*>(x.d_log_w)[at + t * stride + j] = d_w[t];
                    store(static_cast<E*>(x.d_r) + at + t * stride + j,
                          through_start + d_r[t] + d.other_r[t * LD + j] + diagonal * chunk.u[j] * k);
                    own_d_u += diagonal * chunk.r[t * LD + j] * k;
                }
            }
        }
    }
    __syncthreads();
    if (WALK == ALL && half == 0) d_u[(static_cast<long>(part.segment) * shape.n_head + head) * N + j] = own_d_u;
    if (WALK == ALL && !part.opens) return;
    float* to = WALK == ALL ? static_cast<float*>(x.d_state) + of_sequence : summaries + 2 * of_segment + blockIdx.z * states;
    for (int e = threadIdx.x; e < N * N; e += blockDim.x) to[e] = d.g[e / N * LD + e % N];
}

// d_u of each sequence from those of its segments, in their order.
__global__ void sum_bonus(Shape shape, Segments segments, const float* parts, float* d_u) {
    const int sequence = blockIdx.x, head = blockIdx.y, n = shape.head_size;
    const int length = shape.bounds[sequence + 1] - shape.bounds[sequence];
    float sum = 0.0f;
    for (int segment = 0; segment * segments.tokens < length; segment++)
        sum += parts[((static_cast<long>(sequence) * segments.count + segment) * shape.n_head + head) * n + threadIdx.x];
    d_u[(static_cast<long>(sequence) * shape.n_head + head) * n + threadIdx.x] = sum;
}

template <class E, int N>
int run(const Shape& shape, const Backward6& x, const Segments& segments, float* scratch, Stream stream) {
    const size_t bytes = (Chunk6<N>::FLOATS + Gradients6<N>::FLOATS) * sizeof(float);
    const dim3 grid(shape.n_sequences * segments.count, shape.n_head), heads(shape.n_sequences, shape.n_head);
    float* d_u = static_cast<float*>(x.d_u);
    if (segments.count == 1)
        return launch(backward<E, N, ALL>, grid, CHUNKED_THREADS, bytes, stream, shape, x, segments, static_cast<const float*>(nullptr),
                      static_cast<float*>(nullptr), d_u);
    float *summaries = scratch, *ends = scratch + segment_floats(shape, segments) / 3 * 2;
    float* parts = scratch + segment_floats(shape, segments);
    int error = launch(backward<E, N, SUMMARY>, dim3(grid.x, grid.y, 2), CHUNKED_THREADS, bytes, stream, shape, x, segments,
                       static_cast<const float*>(nullptr), summaries, static_cast<float*>(nullptr));
    if (error) return error;
    error = launch(pass_states<N, true>, heads, CHUNKED_THREADS, 3 * N * (N + 4) * sizeof(float), stream, shape, segments,
                   static_cast<const float*>(x.d_final_state), static_cast<const float*>(summaries), ends, true);
    if (error) return error;
    error = launch(backward<E, N, ALL>, grid, CHUNKED_THREADS, bytes, stream, shape, x, segments, static_cast<const float*>(ends),
                   static_cast<float*>(nullptr), parts);
    if (error) return error;
    return launch(sum_bonus, heads, N, 0, stream, shape, segments, static_cast<const float*>(parts), d_u);
}

}  // namespace

size_t wkv6_chunked_backward_scratch(const Shape& shape, int blocks) {
    const Segments segments = cut(shape, blocks);
    const size_t parts = static_cast<size_t>(shape.n_sequences) * segments.count * shape.n_head * shape.head_size;
    return segments.count == 1 ? 0 : (segment_floats(shape, segments) + parts) * sizeof(float);
}

int wkv6_chunked_backward(const Shape& shape, const Backward6& x, int blocks, void* scratch, Stream stream) {
    return by_head(shape, [&](auto n, auto element) {
        return run<decltype(element), n()>(shape, x, cut(shape, blocks), static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
