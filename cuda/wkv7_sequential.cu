// RWKV-7's recurrence on a GPU, token after token: plainly right, for any head. S[value][key],
//     S <- S diag(w_t) + (S z_t) b_t^T + v_t k_t^T,   y_t = S r_t,   z = -kappa, b = kappa * a
// One block a head of a sequence, one thread a row of S, which lives in its registers: rows do not know of each other, so the
// forward has no barrier but those around the staging of 16 tokens' inputs in shared memory.
// The backward runs each interval forward again from its checkpoint, keeping its states in scratch memory, and walks it in
// reverse with the state's gradient in registers twice, by rows and by columns: sums over keys are the row thread's own, sums
// over values the column thread's, and only (gradient b), one number a thread and token, changes hands.
#include "cuda_kernels.h"
#include "device.cuh"

namespace wkv {
namespace {

constexpr int STAGED = CUDA_INTERVAL;

// Inputs of up to STAGED tokens, [token][WIDTH] each, zero beyond the head.
template <int WIDTH>
struct Staged7 {
    float *r, *w, *k, *v, *z, *b;

    __device__ explicit Staged7(float* shared) {
        const int size = STAGED * WIDTH;
        r = shared, w = r + size, k = w + size, v = k + size, z = v + size, b = z + size;
    }

    template <class E, class X>
    __device__ void load(const X& x, long at, long stride, int count, int n) {
        const int i = threadIdx.x;
        for (int t = 0; t < count; t++) {
            const long from = at + t * stride + i;
            const bool inside = i < n;
            const float kappa = inside ? to_float(static_cast<const E*>(x.kappa)[from]) : 0.0f;
            r[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.r)[from]) : 0.0f;
            w[t * WIDTH + i] = inside ? expf(static_cast<const float*>(x.log_w)[from]) : 0.0f;
            k[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.k)[from]) : 0.0f;
            v[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.v)[from]) : 0.0f;
            z[t * WIDTH + i] = -kappa;
            b[t * WIDTH + i] = inside ? kappa * to_float(static_cast<const E*>(x.a)[from]) : 0.0f;
        }
    }
};

template <int WIDTH>
__device__ __forceinline__ float dot(const float (&x)[WIDTH], const float* y) {
    float sums[4] = {};  // four chains, so that an addition need not wait for the one before
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++) sums[j % 4] += x[j] * y[j];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int WIDTH>
__device__ __forceinline__ void step(float (&s)[WIDTH], float sz, const Staged7<WIDTH>& x, int t) {
    const float v = x.v[t * WIDTH + threadIdx.x];
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++)
        s[j] = s[j] * x.w[t * WIDTH + j] + (sz * x.b[t * WIDTH + j] + v * x.k[t * WIDTH + j]);
}

template <class E, int WIDTH>
__global__ void __launch_bounds__(WIDTH) forward(Shape shape, Forward7 x) {
    WKV_SHARED(shared);
    Staged7<WIDTH> staged(shared);
    const int n = shape.head_size, sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = shape.bounds[sequence], end = shape.bounds[sequence + 1];
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = (static_cast<long>(sequence) * shape.n_head + head) * states + static_cast<long>(i) * n;
    float s[WIDTH];
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++) s[j] = i < n && j < n ? static_cast<const float*>(x.state)[own + j] : 0.0f;
    for (int first = start; first < end; first += STAGED) {
        const int count = end - first < STAGED ? end - first : STAGED;
        const long at = first * stride + static_cast<long>(head) * n;
        if (x.checkpoints && i < n) {
            const long row = first_checkpoint(shape.bounds, STAGED, sequence) + (first - start) / STAGED;
            float* checkpoint = static_cast<float*>(x.checkpoints) + (row * shape.n_head + head) * states + static_cast<long>(i) * n;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++)
                if (j < n) checkpoint[j] = s[j];
        }
        __syncthreads();
        staged.template load<E>(x, at, stride, count, n);
        __syncthreads();
        for (int t = 0; t < count; t++) {
            step(s, dot(s, staged.z + t * WIDTH), staged, t);
            const float y = dot(s, staged.r + t * WIDTH);
            if (i < n) store(static_cast<E*>(x.y) + at + t * stride + i, y);
        }
    }
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++)
        if (i < n && j < n) static_cast<float*>(x.final_state)[own + j] = s[j];
}

template <class E, int WIDTH>
__global__ void __launch_bounds__(WIDTH) backward(Shape shape, Backward7 x, float* scratch) {
    WKV_SHARED(shared);
    Staged7<WIDTH> staged(shared);
    float *d_y = staged.b + STAGED * WIDTH, *sz = d_y + STAGED * WIDTH, *d_sz = sz + STAGED * WIDTH;
    const int n = shape.head_size, sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = shape.bounds[sequence], end = shape.bounds[sequence + 1];
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = (static_cast<long>(sequence) * shape.n_head + head) * states;
    // before[t][key][value], so that row threads write side by side.
    float* before = scratch + (static_cast<long>(sequence) * shape.n_head + head) * STAGED * WIDTH * WIDTH;
    float row[WIDTH], column[WIDTH];
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++) {
        row[j] = i < n && j < n ? static_cast<const float*>(x.d_final_state)[own + static_cast<long>(i) * n + j] : 0.0f;
        column[j] = i < n && j < n ? static_cast<const float*>(x.d_final_state)[own + static_cast<long>(j) * n + i] : 0.0f;
    }
    for (int interval = (end - start + STAGED - 1) / STAGED - 1; interval >= 0; interval--) {
        const int first = start + interval * STAGED, count = end - first < STAGED ? end - first : STAGED;
        const long at = first * stride + static_cast<long>(head) * n;
        __syncthreads();
        staged.template load<E>(x, at, stride, count, n);
        for (int t = 0; t < count; t++)
            d_y[t * WIDTH + i] = i < n ? to_float(static_cast<const E*>(x.d_y)[at + t * stride + i]) : 0.0f;
        __syncthreads();
        {
            const long checkpoint = first_checkpoint(shape.bounds, STAGED, sequence) + interval;
            const float* from = static_cast<const float*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states;
            float s[WIDTH];
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) s[j] = i < n && j < n ? from[static_cast<long>(i) * n + j] : 0.0f;
            for (int t = 0; t < count; t++) {
                WKV_UNROLL
                for (int j = 0; j < WIDTH; j++) before[(t * WIDTH + j) * WIDTH + i] = s[j];
                const float own_sz = dot(s, staged.z + t * WIDTH);
                sz[t * WIDTH + i] = own_sz;
                step(s, own_sz, staged, t);
            }
        }
        __syncthreads();
        for (int t = count - 1; t >= 0; t--) {
            const int line = t * WIDTH;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) row[j] += d_y[line + i] * staged.r[line + j];
            const float d_v = dot(row, staged.k + line), own_d_sz = dot(row, staged.b + line);
            d_sz[line + i] = own_d_sz;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) row[j] = row[j] * staged.w[line + j] + own_d_sz * staged.z[line + j];
            __syncthreads();
            const float r = staged.r[line + i], w = staged.w[line + i], k = staged.k[line + i], z = staged.z[line + i],
                        b = staged.b[line + i];
            float d_r = 0, d_w = 0, d_k = 0, d_z = 0, d_b = 0;
            const float* s = before + static_cast<long>(line + i) * WIDTH;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) {
                const float out = d_y[line + j], v = staged.v[line + j], s_z = sz[line + j], d = d_sz[line + j];
                column[j] += out * r;
                d_r += out * (s[j] * w + (s_z * b + v * k));
                d_w += column[j] * s[j];
                d_k += column[j] * v;
                d_b += column[j] * s_z;
                d_z += d * s[j];
                column[j] = column[j] * w + d * z;
            }
            if (i < n) {
                const long to = at + t * stride + i;
                const float kappa = to_float(static_cast<const E*>(x.kappa)[to]), a = to_float(static_cast<const E*>(x.a)[to]);
                store(static_cast<E*>(x.d_r) + to, d_r);
                static_cast<float*>(x.d_log_w)[to] = d_w * w;
                store(static_cast<E*>(x.d_k) + to, d_k);
                store(static_cast<E*>(x.d_v) + to, d_v);
                store(static_cast<E*>(x.d_kappa) + to, d_b * a - d_z);
                store(static_cast<E*>(x.d_a) + to, d_b * kappa);
            }
        }
    }
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++)
        if (i < n && j < n) static_cast<float*>(x.d_state)[own + static_cast<long>(j) * n + i] = column[j];
}

template <class E, int WIDTH>
int run_forward(const Shape& shape, const Forward7& x, Stream stream) {
    return launch(forward<E, WIDTH>, dim3(shape.n_sequences, shape.n_head), WIDTH, 6 * STAGED * WIDTH * sizeof(float), stream, shape, x);
}

template <class E, int WIDTH>
int run_backward(const Shape& shape, const Backward7& x, float* scratch, Stream stream) {
    return launch(backward<E, WIDTH>, dim3(shape.n_sequences, shape.n_head), WIDTH, 9 * STAGED * WIDTH * sizeof(float), stream,
                  shape, x, scratch);
}

}  // namespace

int wkv7_sequential_forward(const Shape& shape, const Forward7& x, Stream stream) {
    return by_width(shape, [&](auto width, auto element) { return run_forward<decltype(element), width()>(shape, x, stream); });
}

size_t wkv7_sequential_scratch(const Shape& shape) { return interval_scratch(shape); }

int wkv7_sequential_backward(const Shape& shape, const Backward7& x, void* scratch, Stream stream) {
    return by_width(shape, [&](auto width, auto element) {
        return run_backward<decltype(element), width()>(shape, x, static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
