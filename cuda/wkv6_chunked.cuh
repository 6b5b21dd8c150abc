// What forward and backward of the chunked v6 kernel share: 16 tokens in shared memory, and their scores.
//
// With A_t the sum of log w up to token t of the chunk and S the state at its start:
//     y_t = (r_t e^{A_{t-1}}) S + sum_{s<t} (r_t . k_s prod_{s<q<t} w_q) v_s + (r_t . u k_t) v_t
//     S_end = e^{A_16} S + sum_s (k_s e^{A_16-A_s}) v_s
// log w has no lower bound, so decays are never split or inverted: those between two tokens are running products, and those to
// the chunk's end are summed from the end. Tokens past the end have log w = 0 and zeros: they change nothing.
#pragma once

#include "segments.cuh"

namespace wkv {

template <int N>
struct Chunk6 {
    static constexpr int LD = N + 4, SCORES = CHUNK + 4;  // padded against bank conflicts
    static constexpr int ROWS = CHUNK * LD, STATE = N * LD;
    float *state, *r, *w, *k, *v, *r_start, *k_end;  // [N][LD], then [16][LD] each: as they are, r e^{A_{t-1}}, k e^{A_16-A_s}
    float *from_start, *to_end, *scores, *u, *last;  // e^{A_{t-1}} and e^{A_16-A_t} [16][LD], [16][SCORES], [N], e^{A_16} [N]

    __device__ explicit Chunk6(float* shared)
        : state(shared), r(state + STATE), w(r + ROWS), k(w + ROWS), v(k + ROWS), r_start(v + ROWS), k_end(r_start + ROWS),
          from_start(k_end + ROWS), to_end(from_start + ROWS), scores(to_end + ROWS), u(scores + CHUNK * SCORES), last(u + N) {}

    static constexpr int FLOATS = STATE + 8 * ROWS + CHUNK * SCORES + 2 * N;

    // Reads `count` tokens. Barriers around it are its own.
    template <class E, class X>
    __device__ void load(const X& x, long at, long stride, int count, bool with_v) {
        __syncthreads();
        for (int e = threadIdx.x; e < CHUNK * N; e += blockDim.x) {
            const int t = e / N, j = e % N, to = t * LD + j;
            const long from = at + t * stride + j;
            const bool inside = t < count;
            w[to] = inside ? static_cast<const float*>(x.log_w)[from] : 0.0f;
            r[to] = inside ? to_float(static_cast<const E*>(x.r)[from]) : 0.0f;
            k[to] = inside ? to_float(static_cast<const E*>(x.k)[from]) : 0.0f;
            v[to] = inside && with_v ? to_float(static_cast<const E*>(x.v)[from]) : 0.0f;
        }
        __syncthreads();
        for (int j = threadIdx.x; j < N; j += blockDim.x) {
            float sum = 0.0f;
            for (int t = 0; t < CHUNK; t++) from_start[t * LD + j] = sum, sum += w[t * LD + j];
            last[j] = expf(sum);
            sum = 0.0f;
            for (int t = CHUNK - 1; t >= 0; t--) to_end[t * LD + j] = sum, sum += w[t * LD + j];
        }
        __syncthreads();
        for (int e = threadIdx.x; e < CHUNK * N; e += blockDim.x) {
            const int at = e / N * LD + e % N;
            w[at] = expf(w[at]);
            from_start[at] = expf(from_start[at]);
            to_end[at] = expf(to_end[at]);
            r_start[at] = r[at] * from_start[at];
            k_end[at] = k[at] * to_end[at];
        }
        __syncthreads();
    }

    // scores[t][s], zero for s > t; eight threads a column s, each with every eighth key. A barrier at the end.
    __device__ void score() {
        static_assert(CHUNKED_THREADS == 8 * CHUNK, "eight threads a token");
        const int s = threadIdx.x / 8, lane = threadIdx.x % 8;
        float decayed[N / 8];
        WKV_UNROLL
        for (int m = 0; m < N / 8; m++) decayed[m] = k[s * LD + lane + 8 * m];
        for (int t = 0; t < CHUNK; t++) {
            float sum = 0.0f;
            WKV_UNROLL
            for (int m = 0; m < N / 8; m++) {
                const int j = lane + 8 * m;
                if (t == s) sum += r[t * LD + j] * u[j] * decayed[m];
                if (t > s) sum += r[t * LD + j] * decayed[m], decayed[m] *= w[t * LD + j];
            }
            for (int other = 1; other < 8; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
            if (lane == 0) scores[t * SCORES + s] = sum;
        }
        __syncthreads();
    }
};

}  // namespace wkv
