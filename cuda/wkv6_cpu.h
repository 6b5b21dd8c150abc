// RWKV-6's recurrence on the CPU, one head of one sequence at a time (arXiv:2404.05892, eq. 16-19), S[key][value]:
//     y_t = r_t^T (S + (u * k_t) v_t^T),   S <- diag(w_t) S + k_t v_t^T
// Rows of S do not know of each other: a few of them stay in registers while the tokens of one interval go by. The backward
// takes the rows' history over an interval from its checkpoint anew and walks it in reverse, so that no decay is ever inverted.
#pragma once

#include "simd.h"

namespace wkv {
namespace WKV_ISA {

template <class E, class C, int WIDTH>
struct Tokens6 {
    Row<C, WIDTH> r[CPU_INTERVAL], w[CPU_INTERVAL], k[CPU_INTERVAL], v[CPU_INTERVAL], u;

    template <class X>
    inline void read(const X& x, long at, long stride, int count, int n) {
        read_tokens(static_cast<const E*>(x.r) + at, stride, count, n, r);
        read_tokens(static_cast<const C*>(x.log_w) + at, stride, count, n, w);
        read_tokens(static_cast<const E*>(x.k) + at, stride, count, n, k);
        read_tokens(static_cast<const E*>(x.v) + at, stride, count, n, v);
        exponentials(w, count);
    }
};

template <int R, class E, class C, int WIDTH>
inline void step6(Row<C, WIDTH> (&s)[R], const Tokens6<E, C, WIDTH>& x, int t, int first) {
    for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) s[i].part[p] = s[i].part[p] * x.w[t][first + i] + x.v[t].part[p] * x.k[t][first + i];
}

template <int R, class E, class C, int WIDTH>
inline void forward6_rows(const Tokens6<E, C, WIDTH>& x, int first, int count, int n, C* state, Row<C, WIDTH>* y) {
    Row<C, WIDTH> s[R];
    for (int i = 0; i < R; i++) s[i].load(state + (first + i) * n, n);
    for (int t = 0; t < count; t++) {
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto sum = y[t].part[p];
            for (int i = 0; i < R; i++) sum += s[i].part[p] * x.r[t][first + i];
            y[t].part[p] = sum;
        }
        step6(s, x, t, first);
    }
    for (int i = 0; i < R; i++) s[i].save(state + (first + i) * n, n);
}

template <class E, class C, int WIDTH>
void forward6(const Shape& shape, const Forward6& x, int sequence, int head) {
    const int n = shape.head_size;
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    C* state = static_cast<C*>(x.final_state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    const C* initial = static_cast<const C*>(x.state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    __builtin_memcpy(state, initial, states * sizeof(C));
    long checkpoint = first_checkpoint(shape.bounds, CPU_INTERVAL, sequence);
    Tokens6<E, C, WIDTH> tokens;
    Row<C, WIDTH> y[CPU_INTERVAL];
    tokens.u.load(static_cast<const C*>(x.u) + head * n, n);
    for (int t = shape.bounds[sequence]; t < shape.bounds[sequence + 1]; t += CPU_INTERVAL, checkpoint++) {
        const int left = shape.bounds[sequence + 1] - t, count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        if (x.checkpoints)
            __builtin_memcpy(static_cast<C*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states, state, states * sizeof(C));
        tokens.read(x, at, stride, count, n);
        for (int i = 0; i < count; i++) {
            const C bonus = product3(tokens.r[i], tokens.u, tokens.k[i]);
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) y[i].part[p] = tokens.v[i].part[p] * bonus;
        }
        int row = 0;
        for (; row + 4 <= n; row += 4) forward6_rows<4>(tokens, row, count, n, state, y);
        for (; row < n; row++) forward6_rows<1>(tokens, row, count, n, state, y);
        write_tokens(static_cast<E*>(x.y) + at, stride, count, n, y);
    }
}

template <class C, int WIDTH>
struct Gradients6 {
    Row<C, WIDTH> y[CPU_INTERVAL], r[CPU_INTERVAL], w[CPU_INTERVAL], k[CPU_INTERVAL], v[CPU_INTERVAL];
};

// From the checkpoint's rows and the gradient of the rows at the interval's end, that at its start; adds to d.v, writes the rest.
template <int R, class E, class C, int WIDTH>
inline void backward6_rows(const Tokens6<E, C, WIDTH>& x, int first, int count, int n, const C* checkpoint, C* gradient,
                           Gradients6<C, WIDTH>& d) {
    Row<C, WIDTH> before[CPU_INTERVAL][R], s[R], g[R];
    for (int i = 0; i < R; i++) {
        s[i].load(checkpoint + (first + i) * n, n);
        g[i].load(gradient + (first + i) * n, n);
    }
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < R; i++) before[t][i] = s[i];
        step6(s, x, t, first);
    }
    for (int t = count - 1; t >= 0; t--) {
        C d_r[R], d_w[R], d_k[R];
        products(before[t], d.y[t], d_r);
        products(before[t], g, d_w);
        products(g, x.v[t], d_k);
        for (int i = 0; i < R; i++) d.r[t][first + i] = d_r[i], d.w[t][first + i] = d_w[i], d.k[t][first + i] = d_k[i];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto v = d.v[t].part[p];
            for (int i = 0; i < R; i++) {
                v += g[i].part[p] * x.k[t][first + i];
                g[i].part[p] = g[i].part[p] * x.w[t][first + i] + d.y[t].part[p] * x.r[t][first + i];
            }
            d.v[t].part[p] = v;
        }
    }
    for (int i = 0; i < R; i++) g[i].save(gradient + (first + i) * n, n);
}

template <class E, class C, int WIDTH>
void backward6(const Shape& shape, const Backward6& x, int sequence, int head) {
    const int n = shape.head_size;
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = static_cast<long>(sequence) * shape.n_head + head;
    C* gradient = static_cast<C*>(x.d_state) + own * states;
    __builtin_memcpy(gradient, static_cast<const C*>(x.d_final_state) + own * states, states * sizeof(C));
    const int start = shape.bounds[sequence], n_intervals = (shape.bounds[sequence + 1] - start + CPU_INTERVAL - 1) / CPU_INTERVAL;
    Tokens6<E, C, WIDTH> tokens;
    Gradients6<C, WIDTH> d;
    Row<C, WIDTH> d_u = {};
    tokens.u.load(static_cast<const C*>(x.u) + head * n, n);
    for (int interval = n_intervals - 1; interval >= 0; interval--) {
        const int t = start + interval * CPU_INTERVAL, left = shape.bounds[sequence + 1] - t;
        const int count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        const C* checkpoint = static_cast<const C*>(x.checkpoints)
            + ((first_checkpoint(shape.bounds, CPU_INTERVAL, sequence) + static_cast<long>(interval)) * shape.n_head + head) * states;
        tokens.read(x, at, stride, count, n);
        __builtin_memset(&d, 0, sizeof(d));
        read_tokens(static_cast<const E*>(x.d_y) + at, stride, count, n, d.y);
        int row = 0;
        for (; row + 4 <= n; row += 4) backward6_rows<4>(tokens, row, count, n, checkpoint, gradient, d);
        for (; row < n; row++) backward6_rows<1>(tokens, row, count, n, checkpoint, gradient, d);
        for (int i = 0; i < count; i++) {
            const C bonus = product3(tokens.r[i], tokens.u, tokens.k[i]), v_y = product(tokens.v[i], d.y[i]);
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
                const auto r = tokens.r[i].part[p], k = tokens.k[i].part[p], u = tokens.u.part[p];
                d.r[i].part[p] += u * k * v_y;
                d.w[i].part[p] *= tokens.w[i].part[p];
                d.k[i].part[p] += u * r * v_y;
                d.v[i].part[p] += d.y[i].part[p] * bonus;
                d_u.part[p] += r * k * v_y;
            }
        }
        write_tokens(static_cast<E*>(x.d_r) + at, stride, count, n, d.r);
        write_tokens(static_cast<C*>(x.d_log_w) + at, stride, count, n, d.w);
        write_tokens(static_cast<E*>(x.d_k) + at, stride, count, n, d.k);
        write_tokens(static_cast<E*>(x.d_v) + at, stride, count, n, d.v);
    }
    d_u.save(static_cast<C*>(x.d_u) + own * n, n);
}

}  // namespace WKV_ISA
}  // namespace wkv
