// RWKV-7's recurrence on a GPU in chunks of 16 tokens: products on the tensor cores, S[value][key] in shared memory.
// One block of 2 N threads a head of a segment (segments.cuh); the algebra, and how a block shares its work, are told in
// wkv7_chunked.cuh. Every input is read once, a chunk ahead and 16 bytes a lane, and every output written once; the state
// before each chunk is the backward's checkpoint.
#include "wkv7_chunked.cuh"

namespace wkv {
namespace wkv7 {
namespace {

// What K and W are read for most runs down their columns.
template <int N>
using ForwardMemory = Memory<N, N + 8>;

// Blocks that a multiprocessor of 228 KB holds at heads of 64: float32's inputs take the registers of one.
template <class E>
constexpr int RESIDENT = std::is_same<E, float>::value ? 3 : 4;

// From `starts`, or the initial state where that is null, to y, checkpoints and the final state, or to `summaries`.
template <class E, int N, Walk WALK>
__global__ void __launch_bounds__(2 * N, RESIDENT<E>) forward(Shape shape, Forward7 x, Segments segments, const float* starts,
                                                               float* summaries) {
    constexpr bool EXACT = std::is_same<E, float>::value;
    constexpr int ROW = ForwardMemory<N>::ROW, P_ROW = ForwardMemory<N>::P_ROW, KEYS_ROW = N + 8, STATES = N * N;
    WKV_SHARED(shared);
    const ForwardMemory<N> m(shared);
    const Part part(shape, segments);
    if (part.empty) return;
    const Place place;
    const int head = blockIdx.y, own = 16 * place.warp;
    const bool identity = WALK == SUMMARY && blockIdx.z == 1;
    const long of_sequence = (static_cast<long>(part.sequence) * shape.n_head + head) * STATES;
    const long of_segment = (static_cast<long>(part.segment) * shape.n_head + head) * STATES;
    const float* start = starts ? starts + of_segment : static_cast<const float*>(x.state) + of_sequence;
    load_rows<N>(start, m.state, ROW, identity ? IDENTITY : WALK == SUMMARY ? ZERO : GIVEN, place);

    float* checkpoint = static_cast<float*>(x.checkpoints);
    if (checkpoint) {
        const int chunks_before = (part.first - shape.bounds[part.sequence]) / CHUNK;
        const long index = first_checkpoint(shape.bounds, CHUNK, part.sequence) + chunks_before;
        checkpoint += (index * shape.n_head + head) * STATES;
    }
    const long stride = static_cast<long>(shape.n_head) * N;
    long at = (part.first + place.token) * stride + static_cast<long>(head) * N + place.column;
    Token<E> token;
    token.load(x, at, part.first + place.token < part.end, !identity);
    for (int first = part.first; first < part.end; first += CHUNK, at += CHUNK * stride) {
        const int t = first + place.token;
        prepare<EXACT, false>(m, token, place);
        __syncthreads();
        token.load(x, at + CHUNK * stride, t + CHUNK < part.end, !identity);
        if (WALK == ALL && checkpoint) {
            store_rows<N>(m.state, ROW, checkpoint, place);
            checkpoint += shape.n_head * STATES;
        }
        causal_product<EXACT, N>(m.q(), m.k().transposed(), m.scores, P_ROW, place);
        float seen[2][2][4] = {};  // of the warp's columns: z S^T, then all of z's right-hand side; r S^T, then all of y
        accumulate<N, EXACT>(seen, m.q(), m.s().transposed().from(0, own));
        __syncthreads();
        accumulate<CHUNK, EXACT>(seen[0], m.p().from(0, CHUNK), m.v().from(0, own));
        put(seen[0], m.values + own, KEYS_ROW);
        solve<false>(m.scores, P_ROW, m.values + own, KEYS_ROW, place);
        if (WALK == ALL) accumulate<BOTH, EXACT>(seen[1], m.p().from(CHUNK, 0), m.w().from(0, own));
        update<EXACT, N>(m.state + own * ROW, ROW, m.w().from(0, own), m.k(), m.decay);
        if (WALK == ALL) {
            // u is done with: y passes through its place, to be written by whole rows.
            __syncwarp();
            put(seen[1], m.values + own, KEYS_ROW);
            __syncwarp();
            float y[8];
            read8(m.values + place.token * KEYS_ROW + place.column, y);
            if (t < part.end) store8(static_cast<E*>(x.y) + at, y);
        }
        __syncthreads();
    }
    __syncwarp();
    if (WALK == ALL && !part.closes) return;
    float* to = WALK == ALL ? static_cast<float*>(x.final_state) + of_sequence : summaries + 2 * of_segment + blockIdx.z * STATES;
    store_rows<N>(m.state, ROW, to, place);
}

template <class E, int N>
int run(const Shape& shape, const Forward7& x, const Segments& segments, float* scratch, Stream stream) {
    const size_t bytes = ForwardMemory<N>::FLOATS * sizeof(float);
    const dim3 grid(shape.n_sequences * segments.count, shape.n_head), heads(shape.n_sequences, shape.n_head);
    const float* starts = nullptr;
    if (segments.count > 1) {
        float* summaries = scratch;
        float* states = scratch + segment_floats(shape, segments) / 3 * 2;
        int error = launch(forward<E, N, SUMMARY>, dim3(grid.x, grid.y, 2), 2 * N, bytes, stream, shape, x, segments,
                           static_cast<const float*>(nullptr), summaries);
        if (error) return error;
        error = launch(pass_states<N, false>, heads, CHUNKED_THREADS, 3 * N * (N + 4) * sizeof(float), stream, shape, segments,
                       static_cast<const float*>(x.state), static_cast<const float*>(summaries), states, false);
        if (error) return error;
        starts = states;
    }
    return launch(forward<E, N, ALL>, grid, 2 * N, bytes, stream, shape, x, segments, starts, static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace wkv7

size_t wkv7_chunked_forward_scratch(const Shape& shape, int blocks) {
    return segment_floats(shape, cut(shape, blocks)) * sizeof(float);
}

int wkv7_chunked_forward(const Shape& shape, const Forward7& x, int blocks, void* scratch, Stream stream) {
    return by_head(shape, [&](auto n, auto element) {
        return wkv7::run<decltype(element), n()>(shape, x, cut(shape, blocks), static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
