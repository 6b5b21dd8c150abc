// Long sequences on wide chips: where sequences times heads leave blocks idle, a sequence is cut into segments that run side by
// side. What a segment does to its start state is linear, v7: S_end = S_start P + Q, v6: S_end = P S_start + Q, so its Q (from
// zero) and P (from the identity, nothing added) are walked first, in parallel; then short products pass the true start states
// along; then all segments run.
#pragma once

#include "cuda_kernels.h"
#include "device.cuh"
#include "tile.cuh"

namespace wkv {

constexpr int CHUNK = CUDA_INTERVAL;
constexpr int SHORTEST_SEGMENT = 256;
constexpr int CHUNKED_THREADS = 128;

// ALL walks a segment to all outputs. SUMMARY only to its linear map: blockIdx.z 0 gives Q, 1 gives P.
enum Walk { ALL, SUMMARY };

struct Segments {
    int count;   // of the longest sequence; blocks of shorter ones beyond their end do nothing
    int tokens;  // in each, a multiple of CHUNK
};

inline Segments cut(const Shape& shape, int blocks) {
    int longest = 0;
    for (int s = 0; s < shape.n_sequences; s++) {
        const int length = shape.host_bounds[s + 1] - shape.host_bounds[s];
        longest = length > longest ? length : longest;
    }
    const int heads = shape.n_sequences * shape.n_head, most = longest / SHORTEST_SEGMENT;
    int wanted = heads > 0 ? blocks / heads : 1;
    wanted = wanted < most ? wanted : most;
    if (wanted <= 1) return {1, longest};
    const int tokens = ((longest + wanted - 1) / wanted + CHUNK - 1) / CHUNK * CHUNK;
    return {(longest + tokens - 1) / tokens, tokens};
}

// One block's share: tokens first to end of a sequence. `segment` numbers them over all sequences.
struct Part {
    int sequence, segment, first, end;
    bool opens, closes;  // the sequence
    bool empty;          // nothing to do, not even for a sequence without tokens

    __device__ Part(const Shape& shape, const Segments& segments) {
        segment = blockIdx.x, sequence = segment / segments.count;
        const int start = shape.bounds[sequence], index = segment % segments.count;
        end = shape.bounds[sequence + 1];
        first = start + index * segments.tokens;
        opens = index == 0;
        empty = !opens && first >= end;
        closes = segments.count == 1 || end - first <= segments.tokens;
        if (!closes) end = first + segments.tokens;
    }
};

// Floats of scratch: for each segment and head P and Q, and the start state.
inline size_t segment_floats(const Shape& shape, const Segments& segments) {
    if (segments.count == 1) return 0;
    return 3 * static_cast<size_t>(shape.n_sequences) * segments.count * shape.n_head * shape.head_size * shape.head_size;
}

// starts[segment] for every segment of a sequence, from its initial state, or, reversed, from its final state's gradient.
template <int N, bool FROM_LEFT>
__global__ void pass_states(Shape shape, Segments segments, const float* initial, const float* summaries, float* starts, bool reversed) {
    WKV_SHARED(shared);
    constexpr int LD = N + 4;
    float *state = shared, *next = state + N * LD, *p = next + N * LD;
    const int sequence = blockIdx.x, head = blockIdx.y;
    const int length = shape.bounds[sequence + 1] - shape.bounds[sequence];
    // A sequence without tokens has one segment all the same, which hands its state on.
    const int count = length > 0 ? (length + segments.tokens - 1) / segments.tokens : 1;
    const long states = N * N, own = (static_cast<long>(sequence) * shape.n_head + head) * states;
    for (int e = threadIdx.x; e < N * N; e += blockDim.x) state[e / N * LD + e % N] = initial[own + e];
    __syncthreads();
    for (int step = 0; step < count; step++) {
        const long segment = static_cast<long>(sequence) * segments.count + (reversed ? count - 1 - step : step);
        const long at = (segment * shape.n_head + head) * states;
        const float* q = summaries + 2 * at;
        for (int e = threadIdx.x; e < N * N; e += blockDim.x) {
            starts[at + e] = state[e / N * LD + e % N];
            if (step + 1 < count) p[e / N * LD + e % N] = q[states + e];
        }
        if (step + 1 == count) return;
        __syncthreads();
        product<N, N, N, true>(View{FROM_LEFT ? p : state, LD, 1}, View{FROM_LEFT ? state : p, LD, 1},
                               [&](int i, int j, float x) { next[i * LD + j] = x + q[i * N + j]; });
        __syncthreads();
        float* old = state;
        state = next, next = old;
    }
}

// Calls f(head size as a constant, an element) for what `chunked_serves`.
template <class F>
int by_head(const Shape& shape, F f) {
    auto with = [&](auto n) { return shape.dtype == BFLOAT16 ? f(n, bf16{}) : f(n, float{}); };
    return shape.head_size == 32 ? with(std::integral_constant<int, 32>()) : with(std::integral_constant<int, 64>());
}

}  // namespace wkv
