// RWKV-6's recurrence on a GPU in chunks of 16 tokens: products on the tensor cores, S[key][value] in shared memory.
// One block of 4 warps a head of a segment (segments.cuh); the algebra is in wkv6_chunked.cuh. Every input is read once and every
// output written once; the state before each chunk is the backward's checkpoint.
#include "wkv6_chunked.cuh"

namespace wkv {
namespace {

// From `starts`, or the initial state where that is null, to y, checkpoints and the final state, or to `summaries`.
template <class E, int N, Walk WALK>
__global__ void __launch_bounds__(CHUNKED_THREADS) forward(Shape shape, Forward6 x, Segments segments, const float* starts,
                                                           float* summaries) {
    constexpr bool EXACT = std::is_same<E, float>::value;
    constexpr int LD = Chunk6<N>::LD, SCORES = Chunk6<N>::SCORES;
    WKV_SHARED(shared);
    Chunk6<N> chunk(shared);
    float* y = shared + Chunk6<N>::FLOATS;
    const Part part(shape, segments);
    if (part.empty) return;
    const int head = blockIdx.y;
    const long stride = static_cast<long>(shape.n_head) * N, states = N * N;
    const long of_sequence = (static_cast<long>(part.sequence) * shape.n_head + head) * states;
    const long of_segment = (static_cast<long>(part.segment) * shape.n_head + head) * states;
    const float* start = starts ? starts + of_segment : static_cast<const float*>(x.state) + of_sequence;
    for (int e = threadIdx.x; e < N * N; e += blockDim.x)
        chunk.state[e / N * LD + e % N] = WALK == ALL ? start[e] : blockIdx.z == 1 && e / N == e % N ? 1.0f : 0.0f;
    for (int j = threadIdx.x; j < N; j += blockDim.x) chunk.u[j] = static_cast<const float*>(x.u)[head * N + j];
    long checkpoint = first_checkpoint(shape.bounds, CHUNK, part.sequence) + (part.first - shape.bounds[part.sequence]) / CHUNK;
    for (int first = part.first; first < part.end; first += CHUNK, checkpoint++) {
        const int count = part.end - first < CHUNK ? part.end - first : CHUNK;
        const long at = first * stride + static_cast<long>(head) * N;
        if (WALK == ALL && x.checkpoints) {
            __syncthreads();
            float* saved = static_cast<float*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states;
            for (int e = threadIdx.x; e < N * N; e += blockDim.x) saved[e] = chunk.state[e / N * LD + e % N];
        }
        chunk.template load<E>(x, at, stride, count, WALK == ALL || blockIdx.z == 0);
        if (WALK == ALL) {
            chunk.score();
            product<CHUNK, N, N, EXACT>(View{chunk.r_start, LD, 1}, View{chunk.state, LD, 1},
                                        [&](int t, int i, float out) { y[t * LD + i] = out; });
            product<CHUNK, N, CHUNK, EXACT>(View{chunk.scores, SCORES, 1}, Rounded{{chunk.v, LD, 1}}, [&](int t, int i, float out) {
                if (t < count) store(static_cast<E*>(x.y) + at + t * stride + i, y[t * LD + i] + out);
            });
            __syncthreads();
        }
        product<N, N, CHUNK, EXACT>(View{chunk.k_end, 1, LD}, Rounded{{chunk.v, LD, 1}}, [&](int j, int i, float added) {
            chunk.state[j * LD + i] = chunk.state[j * LD + i] * chunk.last[j] + added;
        });
    }
    __syncthreads();
    if (WALK == ALL && !part.closes) return;
    float* to = WALK == ALL ? static_cast<float*>(x.final_state) + of_sequence : summaries + 2 * of_segment + blockIdx.z * states;
    for (int e = threadIdx.x; e < N * N; e += blockDim.x) to[e] = chunk.state[e / N * LD + e % N];
}

template <class E, int N>
int run(const Shape& shape, const Forward6& x, const Segments& segments, float* scratch, Stream stream) {
    const size_t bytes = (Chunk6<N>::FLOATS + Chunk6<N>::ROWS) * sizeof(float);
    const dim3 grid(shape.n_sequences * segments.count, shape.n_head), heads(shape.n_sequences, shape.n_head);
    const float* starts = nullptr;
    if (segments.count > 1) {
        float* summaries = scratch;
        float* states = scratch + segment_floats(shape, segments) / 3 * 2;
        int error = launch(forward<E, N, SUMMARY>, dim3(grid.x, grid.y, 2), CHUNKED_THREADS, bytes, stream, shape, x, segments,
                           static_cast<const float*>(nullptr), summaries);
        if (error) return error;
        error = launch(pass_states<N, true>, heads, CHUNKED_THREADS, 3 * N * (N + 4) * sizeof(float), stream, shape, segments,
                       static_cast<const float*>(x.state), static_cast<const float*>(summaries), states, false);
        if (error) return error;
        starts = states;
    }
    return launch(forward<E, N, ALL>, grid, CHUNKED_THREADS, bytes, stream, shape, x, segments, starts, static_cast<float*>(nullptr));
}

}  // namespace

size_t wkv6_chunked_forward_scratch(const Shape& shape, int blocks) {
    return segment_floats(shape, cut(shape, blocks)) * sizeof(float);
}

int wkv6_chunked_forward(const Shape& shape, const Forward6& x, int blocks, void* scratch, Stream stream) {
    return by_head(shape, [&](auto n, auto element) {
        return run<decltype(element), n()>(shape, x, cut(shape, blocks), static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
