// RWKV-6's recurrence on a GPU, token after token: plainly right, for any head. S[key][value],
//     y_t = r_t^T (S + (u * k_t) v_t^T),   S <- diag(w_t) S + k_t v_t^T
// One block a head of a sequence, one thread a column of S (a value), which lives in its registers: columns do not know of each
// other, so the forward has no barrier but those around the staging of 16 tokens' inputs in shared memory.
// The backward runs each interval forward again from its checkpoint, keeping its states in scratch memory, and walks it in
// reverse with the state's gradient in registers twice: a thread's column gives the gradient of v, its row those of r, w, k.
#include "cuda_kernels.h"
#include "device.cuh"

namespace wkv {
namespace {

constexpr int STAGED = CUDA_INTERVAL;

// Inputs of up to STAGED tokens, [token][WIDTH] each, zero beyond the head; u [WIDTH].
template <int WIDTH>
struct Staged6 {
    float *r, *w, *k, *v, *u;

    __device__ explicit Staged6(float* shared) {
        const int size = STAGED * WIDTH;
        r = shared, w = r + size, k = w + size, v = k + size, u = v + size;
    }

    template <class E, class X>
    __device__ void load(const X& x, long at, long stride, int count, int n) {
        const int i = threadIdx.x;
        for (int t = 0; t < count; t++) {
            const long from = at + t * stride + i;
            const bool inside = i < n;
            r[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.r)[from]) : 0.0f;
            w[t * WIDTH + i] = inside ? expf(static_cast<const float*>(x.log_w)[from]) : 0.0f;
            k[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.k)[from]) : 0.0f;
            v[t * WIDTH + i] = inside ? to_float(static_cast<const E*>(x.v)[from]) : 0.0f;
        }
    }

    // sum of r u k over keys
    __device__ float bonus(int t) const {
        float sum = 0;
        WKV_UNROLL
        for (int j = 0; j < WIDTH; j++) sum += r[t * WIDTH + j] * u[j] * k[t * WIDTH + j];
        return sum;
    }
};

template <class E, int WIDTH>
__global__ void __launch_bounds__(WIDTH) forward(Shape shape, Forward6 x) {
    WKV_SHARED(shared);
    Staged6<WIDTH> staged(shared);
    const int n = shape.head_size, sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = shape.bounds[sequence], end = shape.bounds[sequence + 1];
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = (static_cast<long>(sequence) * shape.n_head + head) * states + i;
    float s[WIDTH];
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++) s[j] = i < n && j < n ? static_cast<const float*>(x.state)[own + static_cast<long>(j) * n] : 0.0f;
    staged.u[i] = i < n ? static_cast<const float*>(x.u)[head * n + i] : 0.0f;
    for (int first = start; first < end; first += STAGED) {
        const int count = end - first < STAGED ? end - first : STAGED;
        const long at = first * stride + static_cast<long>(head) * n;
        if (x.checkpoints && i < n) {
            const long row = first_checkpoint(shape.bounds, STAGED, sequence) + (first - start) / STAGED;
            float* checkpoint = static_cast<float*>(x.checkpoints) + (row * shape.n_head + head) * states + i;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++)
                if (j < n) checkpoint[static_cast<long>(j) * n] = s[j];
        }
        __syncthreads();
        staged.template load<E>(x, at, stride, count, n);
        __syncthreads();
        for (int t = 0; t < count; t++) {
            const int line = t * WIDTH;
            const float v = staged.v[line + i];
            float y[4] = {};  // four chains, so that an addition need not wait for the one before
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) {
                const float k_v = staged.k[line + j] * v;
                y[j % 4] += staged.r[line + j] * (s[j] + staged.u[j] * k_v);
                s[j] = s[j] * staged.w[line + j] + k_v;
            }
            if (i < n) store(static_cast<E*>(x.y) + at + t * stride + i, (y[0] + y[1]) + (y[2] + y[3]));
        }
    }
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++)
        if (i < n && j < n) static_cast<float*>(x.final_state)[own + static_cast<long>(j) * n] = s[j];
}

template <class E, int WIDTH>
__global__ void __launch_bounds__(WIDTH) backward(Shape shape, Backward6 x, float* scratch) {
    WKV_SHARED(shared);
    Staged6<WIDTH> staged(shared);
    float* d_y = staged.u + WIDTH;
    const int n = shape.head_size, sequence = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const int start = shape.bounds[sequence], end = shape.bounds[sequence + 1];
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = (static_cast<long>(sequence) * shape.n_head + head) * states;
    // before[t][value][key]: a row's thread writes and reads it, side by side with its neighbours.
    float* before = scratch + (static_cast<long>(sequence) * shape.n_head + head) * STAGED * WIDTH * WIDTH;
    float row[WIDTH], column[WIDTH], d_u = 0;
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++) {
        row[j] = i < n && j < n ? static_cast<const float*>(x.d_final_state)[own + static_cast<long>(i) * n + j] : 0.0f;
        column[j] = i < n && j < n ? static_cast<const float*>(x.d_final_state)[own + static_cast<long>(j) * n + i] : 0.0f;
    }
    const float u = i < n ? static_cast<const float*>(x.u)[head * n + i] : 0.0f;
    staged.u[i] = u;
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
                const float w = staged.w[t * WIDTH + i], k = staged.k[t * WIDTH + i];
                WKV_UNROLL
                for (int j = 0; j < WIDTH; j++) {
                    before[(t * WIDTH + j) * WIDTH + i] = s[j];
                    s[j] = s[j] * w + k * staged.v[t * WIDTH + j];
                }
            }
        }
        for (int t = count - 1; t >= 0; t--) {
            const int line = t * WIDTH;
            const float r = staged.r[line + i], w = staged.w[line + i], k = staged.k[line + i], out = d_y[line + i];
            float d_v = out * staged.bonus(t), v_y = 0, d_r = 0, d_w = 0, d_k = 0;
            WKV_UNROLL
            for (int j = 0; j < WIDTH; j++) {
                const float s = before[(line + j) * WIDTH + i], v = staged.v[line + j], d = d_y[line + j];
                v_y += v * d;
                d_r += s * d;
                d_w += s * row[j];
                d_k += v * row[j];
                row[j] = row[j] * w + r * d;
                d_v += column[j] * staged.k[line + j];
                column[j] = column[j] * staged.w[line + j] + staged.r[line + j] * out;
            }
            d_u += r * k * v_y;
            if (i < n) {
                const long to = at + t * stride + i;
                store(static_cast<E*>(x.d_r) + to, d_r + u * k * v_y);
                static_cast<float*>(x.d_log_w)[to] = d_w * w;
                store(static_cast<E*>(x.d_k) + to, d_k + u * r * v_y);
                store(static_cast<E*>(x.d_v) + to, d_v);
            }
        }
    }
    WKV_UNROLL
    for (int j = 0; j < WIDTH; j++)
        if (i < n && j < n) static_cast<float*>(x.d_state)[own + static_cast<long>(j) * n + i] = column[j];
    if (i < n) static_cast<float*>(x.d_u)[(static_cast<long>(sequence) * shape.n_head + head) * n + i] = d_u;
}

template <class E, int WIDTH>
int run_forward(const Shape& shape, const Forward6& x, Stream stream) {
    return launch(forward<E, WIDTH>, dim3(shape.n_sequences, shape.n_head), WIDTH, (4 * STAGED + 1) * WIDTH * sizeof(float), stream,
                  shape, x);
}

template <class E, int WIDTH>
int run_backward(const Shape& shape, const Backward6& x, float* scratch, Stream stream) {
    return launch(backward<E, WIDTH>, dim3(shape.n_sequences, shape.n_head), WIDTH, (5 * STAGED + 1) * WIDTH * sizeof(float), stream,
                  shape, x, scratch);
}

}  // namespace

int wkv6_sequential_forward(const Shape& shape, const Forward6& x, Stream stream) {
    return by_width(shape, [&](auto width, auto element) { return run_forward<decltype(element), width()>(shape, x, stream); });
}

size_t wkv6_sequential_scratch(const Shape& shape) { return interval_scratch(shape); }

int wkv6_sequential_backward(const Shape& shape, const Backward6& x, void* scratch, Stream stream) {
    return by_width(shape, [&](auto width, auto element) {
        return run_backward<decltype(element), width()>(shape, x, static_cast<float*>(scratch), stream);
    });
}

}  // namespace wkv
