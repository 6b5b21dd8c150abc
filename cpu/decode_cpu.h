// What lies between the products of a model that writes text, on the CPU; arguments in decode_kernels.h.
#pragma once

#include "decode_kernels.h"
#include "sample.h"
#include "simd.h"

namespace wkv {
namespace WKV_ISA {

typedef Vector<float>::type vec;
typedef int ivec __attribute__((vector_size(WKV_BYTES)));
typedef short short_vec __attribute__((vector_size(WKV_BYTES / 2)));
constexpr int STEP = Vector<float>::LANES;

// n elements, zeros behind them. Whole vectors go apart: copying a number of bytes that varies takes many times as long.
WKV_INLINE vec take(const float* from, int n) {
    if (n >= STEP) return *reinterpret_cast<const Vector<float>::unaligned*>(from);
    vec x{};
    __builtin_memcpy(&x, from, n * sizeof(float));
    return x;
}
WKV_INLINE void give(float* to, vec x, int n) {
    if (n >= STEP)
        *reinterpret_cast<Vector<float>::unaligned*>(to) = x;
    else
        __builtin_memcpy(to, &x, n * sizeof(float));
}

WKV_INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }

WKV_INLINE vec exp_below_zero(vec x) {
    Row<float, STEP> row;
    row.part[0] = x;
    exponentials(row);
    return row.part[0];
}

WKV_INLINE vec exponential(vec x) {
    const vec e = exp_below_zero(-magnitude(x));
    return x > 0 ? 1 / e : e;
}

WKV_INLINE vec sigmoid(vec x) {
    const vec e = exp_below_zero(-magnitude(x));
    return (x > 0 ? vec{} + 1 : e) / (1 + e);
}

WKV_INLINE vec hyperbolic_tangent(vec x) {
    const vec e = exp_below_zero(-2 * magnitude(x)), far = (1 - e) / (1 + e), s = x * x;
    // Near 0, where 1 - e would cancel, by its series.
    const vec near = x + x * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
    return magnitude(x) < 0.3f ? near : x > 0 ? far : -far;
}

WKV_INLINE vec activate(vec x, int activation) {
    switch (activation) {
        case TANH: return hyperbolic_tangent(x);
        case SIGMOID: return sigmoid(x);
        case RELU_SQUARE: x = x < 0 ? vec{} : x; return x * x;  // a NaN stays one
        default: return x;
    }
}

WKV_INLINE float total_of(vec x) {
    float sum = 0;
    for (int i = 0; i < STEP; i++) sum += x[i];
    return sum;
}

// Mean and 1 / sqrt(variance + eps) of n numbers.
WKV_INLINE void moments(const float* x, int n, float eps, float& mean, float& scale) {
    vec sum{}, squares{};
    for (int i = 0; i < n; i += STEP) sum += take(x + i, n - i);
    mean = total_of(sum) / n;
    for (int i = 0; i < n; i += STEP) {
        vec centred = take(x + i, n - i) - mean;
        for (int j = n - i; j < STEP; j++) centred[j] = 0;
        squares += centred * centred;
    }
    scale = 1 / __builtin_sqrtf(total_of(squares) / n + eps);
}

void norm_mix(const NormMix& p, int sequence) {
    const int d = p.width;
    float* shift = p.shift + static_cast<long>(sequence) * d;
    const float* previous = shift;
    for (int t = p.bounds[sequence]; t < p.bounds[sequence + 1]; t++) {
        const float* x = p.x + static_cast<long>(t) * d;
        float *normed = p.normed + static_cast<long>(t) * d, mean, scale;
        moments(x, d, p.eps, mean, scale);
        for (int i = 0; i < d; i += STEP) {
            const vec y = (take(x + i, d - i) - mean) * scale * take(p.weight + i, d - i) + take(p.bias + i, d - i);
            give(normed + i, y, d - i);
            const vec delta = take(previous + i, d - i) - y;
            give(p.delta + static_cast<long>(t) * d + i, delta, d - i);
            for (int m = 0; m < p.n_mixes; m++)
                give(p.out + (static_cast<long>(m) * p.total + t) * d + i, y + delta * take(p.mixes + m * d + i, d - i), d - i);
        }
        previous = normed;
    }
    if (previous != shift) __builtin_memcpy(shift, previous, d * sizeof(float));
}

void token_mix(const TokenMix& p, int t) {
    const int d = p.width;
    const long at = static_cast<long>(t) * d;
    for (int i = 0; i < d; i += STEP) {
        const vec x = take(p.normed + at + i, d - i), delta = take(p.delta + at + i, d - i);
        for (int m = 0; m < 5; m++) {
            float* moved = p.moved[m] + at + i;
            give(moved, x + delta * (take(p.mixes + m * d + i, d - i) + take(moved, d - i)), d - i);
        }
    }
}

void before7(const Around7& p, int sequence, int head) {
    const int n = p.head_size, first = head * n;
    for (int t = p.bounds[sequence]; t < p.bounds[sequence + 1]; t++) {
        const long at = (static_cast<long>(t) * p.n_head + head) * n;
        vec squares{};
        for (int i = 0; i < n; i += STEP) {
            const int c = first + i, left = n - i;
            const vec removal = take(p.k + at + i, left) * take(p.k_k + c, left);
            squares += removal * removal;
            give(p.kappa + at + i, removal, left);
            const vec rate = sigmoid(take(p.a0 + c, left) + take(p.a + at + i, left));
            give(p.a + at + i, rate, left);
            give(p.k + at + i, take(p.k + at + i, left) * (1 + (rate - 1) * take(p.k_a + c, left)), left);
            give(p.w + at + i, -0.606530659712633f * sigmoid(take(p.w0 + c, left) + take(p.w + at + i, left)), left);
            if (p.v_first) {
                const vec v = take(p.v + at + i, left), gate = sigmoid(take(p.v0 + c, left) + take(p.v_gate + at + i, left));
                give(p.v + at + i, v + (take(p.v_first + at + i, left) - v) * gate, left);
            }
        }
        const float length = __builtin_sqrtf(total_of(squares)), scale = 1 / (length < 1e-12f ? 1e-12f : length);
        for (int i = 0; i < n; i += STEP) give(p.kappa + at + i, take(p.kappa + at + i, n - i) * scale, n - i);
    }
}

void after7(const Around7& p, int sequence, int head) {
    const int n = p.head_size, first = head * n;
    for (int t = p.bounds[sequence]; t < p.bounds[sequence + 1]; t++) {
        const long at = (static_cast<long>(t) * p.n_head + head) * n;
        float mean, scale;
        moments(p.y + at, n, p.eps, mean, scale);
        vec bonus{};
        for (int i = 0; i < n; i += STEP)
            bonus += take(p.r + at + i, n - i) * take(p.k + at + i, n - i) * take(p.r_k + first + i, n - i);
        const float all = total_of(bonus);
        for (int i = 0; i < n; i += STEP) {
            const int c = first + i, left = n - i;
            const vec y = (take(p.y + at + i, left) - mean) * scale * take(p.norm_weight + c, left) + take(p.norm_bias + c, left);
            give(p.y + at + i, (y + all * take(p.v + at + i, left)) * take(p.g + at + i, left), left);
        }
    }
}

void before6(const Around6& p, int sequence, int head) {
    const int n = p.head_size, first = head * n;
    for (int t = p.bounds[sequence]; t < p.bounds[sequence + 1]; t++)
        for (int i = 0; i < n; i += STEP) {
            float* w = p.w + (static_cast<long>(t) * p.n_head + head) * n + i;
            give(w, -exponential(take(w, n - i) + take(p.time_decay + first + i, n - i)), n - i);
        }
}

void after6(const Around6& p, int sequence, int head) {
    const int n = p.head_size, first = head * n;
    for (int t = p.bounds[sequence]; t < p.bounds[sequence + 1]; t++) {
        const long at = (static_cast<long>(t) * p.n_head + head) * n;
        float mean, scale;
        moments(p.y + at, n, p.eps, mean, scale);
        for (int i = 0; i < n; i += STEP) {
            const int c = first + i, left = n - i;
            const vec y = (take(p.y + at + i, left) - mean) * scale * take(p.norm_weight + c, left) + take(p.norm_bias + c, left);
            const vec g = take(p.g + at + i, left);
            give(p.y + at + i, y * (g * sigmoid(g)), left);
        }
    }
}

// As may_be_drawn in sample.h: all bits of an element are set where it says no.
WKV_INLINE ivec forbidden(const short* next, int n, bool last, int n_blank) {
    short_vec part{};
    __builtin_memcpy(&part, next, n < STEP ? n * sizeof(short) : sizeof(part));
    const ivec state = __builtin_convertvector(part, ivec);
    return (state == static_cast<int>(NEVER)) | (last ? (state >= 0) & (state < n_blank) : ivec{});
}

double softmax_terms(float* x, const short* next, bool last, int n_blank, long n) {
    const vec nothing = vec{} - __builtin_inff();
    vec most = nothing;
    ivec wrong{};
    for (long i = 0; i < n; i += STEP) {
        const int left = n - i < STEP ? n - i : STEP;
        vec part = take(x + i, left);
        wrong |= ~(ivec)(part <= 3.4e38f);  // an infinity or not a number
        part = forbidden(next + i, left, last, n_blank) ? nothing : part;
        give(x + i, part, left);
        for (int j = left; j < STEP; j++) part[j] = -__builtin_inff();
        most = part > most ? part : most;
    }
    for (int i = 0; i < STEP; i++)
        if (wrong[i]) return __builtin_nan("");
    float largest = most[0];
    for (int i = 1; i < STEP; i++) largest = most[i] > largest ? most[i] : largest;
    if (largest < -3.4e38f) return __builtin_nan("");
    // In double: as exact as the sums of single terms that it is compared with, so that a nucleus's border is theirs alone.
    typedef float half __attribute__((vector_size(WKV_BYTES / 2)));
    Vector<double>::type sums[2]{};
    for (long i = 0; i < n; i += STEP) {
        const int left = n - i < STEP ? n - i : STEP;
        const vec from = take(x + i, left);
        vec e = exp_below_zero(from - largest);
        e = from < -3.4e38f ? vec{} : e;
        give(x + i, e, left);
        for (int j = left; j < STEP; j++) e[j] = 0;
        half halves[2];
        __builtin_memcpy(halves, &e, sizeof(e));
        for (int h = 0; h < 2; h++) sums[h] += __builtin_convertvector(halves[h], Vector<double>::type);
    }
    sums[0] += sums[1];
    double sum = 0;
    for (int i = 0; i < STEP / 2; i++) sum += sums[0][i];
    return sum;
}

}  // namespace WKV_ISA
}  // namespace wkv
