// RWKV-6's recurrence on the CPU, one head of one sequence at a time (arXiv:2404.05892, eq. 16-19), S[key][value]:
//     y_t = r_t^T (S + (u * k_t) v_t^T),   S <- diag(w_t) S + k_t v_t^T
// Rows of S do not know of each other: a few of them stay in registers while the tokens of one interval go by. The backward
// takes the rows' history over an interval from its checkpoint anew and walks it in reverse, so that no decay is ever inverted.
#pragma once

#include "simd.h"

namespace wkv {
namespace WKV_ISA {

// One token's inputs side by side: in arrays of their own they would all fall into the same sets of the first cache.
template <class C, int WIDTH>
struct Token6 {
    Row<C, WIDTH> r, w, k, v;

    template <class E, class X>
    WKV_INLINE void read(const X& x, long at, int n) {
        read_row(static_cast<const E*>(x.r) + at, n, r);
        read_row(static_cast<const C*>(x.log_w) + at, n, w);
        read_row(static_cast<const E*>(x.k) + at, n, k);
        read_row(static_cast<const E*>(x.v) + at, n, v);
        exponentials(w);
    }
};

template <int R, class C, int WIDTH>
WKV_INLINE void step6(Row<C, WIDTH> (&s)[R], const Token6<C, WIDTH>& x, int first) {
    for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) s[i].part[p] = s[i].part[p] * x.w[first + i] + x.v.part[p] * x.k[first + i];
}

template <int R, class C, int WIDTH>
WKV_INLINE void forward6_rows(const Token6<C, WIDTH>* x, int first, int count, int n, C* state, Row<C, WIDTH>* y) {
    Row<C, WIDTH> s[R];
    for (int i = 0; i < R; i++) s[i].load(state + (first + i) * n, n);
    for (int t = 0; t < count; t++) {
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto sum = y[t].part[p];
            for (int i = 0; i < R; i++) sum += s[i].part[p] * x[t].r[first + i];
            y[t].part[p] = sum;
        }
        step6(s, x[t], first);
    }
    for (int i = 0; i < R; i++) s[i].save(state + (first + i) * n, n);
}

template <class E, class C, int WIDTH>
void forward6(const Shape& shape, const Forward6& x, int sequence, int head) {
    const int n = shape.head_size;
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    C* state = static_cast<C*>(x.final_state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    const C* initial = static_cast<const C*>(x.state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    if (state != initial) __builtin_memcpy(state, initial, states * sizeof(C));
    long checkpoint = first_checkpoint(shape.bounds, CPU_INTERVAL, sequence);
    Token6<C, WIDTH> tokens[CPU_INTERVAL];
    Row<C, WIDTH> y[CPU_INTERVAL];
    Row<C, WIDTH> u;
    u.load(static_cast<const C*>(x.u) + head * n, n);
    for (int t = shape.bounds[sequence]; t < shape.bounds[sequence + 1]; t += CPU_INTERVAL, checkpoint++) {
        const int left = shape.bounds[sequence + 1] - t, count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        if (x.checkpoints)
            __builtin_memcpy(static_cast<C*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states, state, states * sizeof(C));
        for (int i = 0; i < count; i++) tokens[i].template read<E>(x, at + i * stride, n);
        for (int i = 0; i < count; i++) {
            const C bonus = product3(tokens[i].r, u, tokens[i].k);
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) y[i].part[p] = tokens[i].v.part[p] * bonus;
        }
        int row = 0;
        for (; row + 4 <= n; row += 4) forward6_rows<4>(tokens, row, count, n, state, y);
        for (; row < n; row++) forward6_rows<1>(tokens, row, count, n, state, y);
        for (int i = 0; i < count; i++) write_row(static_cast<E*>(x.y) + at + i * stride, n, y[i]);
    }
}

template <class C, int WIDTH>
struct Gradient6 {
    Row<C, WIDTH> y, r, w, k, v;
};

// From the checkpoint's rows and the gradient of the rows at the interval's end, that at its start; adds to d.v, writes the rest.
template <int R, class C, int WIDTH>
WKV_INLINE void backward6_rows(const Token6<C, WIDTH>* x, int first, int count, int n, const C* checkpoint, C* gradient,
                           Gradient6<C, WIDTH>* d) {
    Row<C, WIDTH> before[CPU_INTERVAL][R], s[R], g[R];
    for (int i = 0; i < R; i++) {
        s[i].load(checkpoint + (first + i) * n, n);
        g[i].load(gradient + (first + i) * n, n);
    }
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < R; i++) before[t][i] = s[i];
        step6(s, x[t], first);
    }
    for (int t = count - 1; t >= 0; t--) {
        C d_r[R], d_w[R], d_k[R];
        products(before[t], d[t].y, d_r);
        products(before[t], g, d_w);
        products(g, x[t].v, d_k);
        for (int i = 0; i < R; i++) d[t].r[first + i] = d_r[i], d[t].w[first + i] = d_w[i], d[t].k[first + i] = d_k[i];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto v = d[t].v.part[p];
            for (int i = 0; i < R; i++) {
                v += g[i].part[p] * x[t].k[first + i];
                g[i].part[p] = g[i].part[p] * x[t].w[first + i] + d[t].y.part[p] * x[t].r[first + i];
            }
            d[t].v.part[p] = v;
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
    Token6<C, WIDTH> tokens[CPU_INTERVAL];
    Gradient6<C, WIDTH> d[CPU_INTERVAL];
    Row<C, WIDTH> d_u = {};
    Row<C, WIDTH> u;
    u.load(static_cast<const C*>(x.u) + head * n, n);
    for (int interval = n_intervals - 1; interval >= 0; interval--) {
        const int t = start + interval * CPU_INTERVAL, left = shape.bounds[sequence + 1] - t;
        const int count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        const C* checkpoint = static_cast<const C*>(x.checkpoints)
            + ((first_checkpoint(shape.bounds, CPU_INTERVAL, sequence) + static_cast<long>(interval)) * shape.n_head + head) * states;
        for (int i = 0; i < count; i++) tokens[i].template read<E>(x, at + i * stride, n);
        __builtin_memset(d, 0, sizeof(d));
        for (int i = 0; i < count; i++) read_row(static_cast<const E*>(x.d_y) + at + i * stride, n, d[i].y);
        int row = 0;
        for (; row + 4 <= n; row += 4) backward6_rows<4>(tokens, row, count, n, checkpoint, gradient, d);
        for (; row < n; row++) backward6_rows<1>(tokens, row, count, n, checkpoint, gradient, d);
        for (int i = 0; i < count; i++) {
            const C bonus = product3(tokens[i].r, u, tokens[i].k), v_y = product(tokens[i].v, d[i].y);
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
                const auto r = tokens[i].r.part[p], k = tokens[i].k.part[p], u_part = u.part[p];
                d[i].r.part[p] += u_part * k * v_y;
                d[i].w.part[p] *= tokens[i].w.part[p];
                d[i].k.part[p] += u_part * r * v_y;
                d[i].v.part[p] += d[i].y.part[p] * bonus;
                d_u.part[p] += r * k * v_y;
            }
        }
        for (int i = 0; i < count; i++) {
            const long to = at + i * stride;
            write_row(static_cast<E*>(x.d_r) + to, n, d[i].r);
            write_row(static_cast<C*>(x.d_log_w) + to, n, d[i].w);
            write_row(static_cast<E*>(x.d_k) + to, n, d[i].k);
            write_row(static_cast<E*>(x.d_v) + to, n, d[i].v);
        }
    }
    d_u.save(static_cast<C*>(x.d_u) + own * n, n);
}

}  // namespace WKV_ISA
}  // namespace wkv
