// RWKV-7's recurrence on the CPU, one head of one sequence at a time (arXiv:2503.14456, eq. 16-18), S[value][key]:
//     S <- S diag(w_t) + (S z_t) b_t^T + v_t k_t^T,   y_t = S r_t,   z = -kappa, b = kappa * a
// Rows of S do not know of each other: a few of them stay in registers while the tokens of one interval go by. The backward
// takes the rows' history over an interval from its checkpoint anew and walks it in reverse, so that no decay is ever inverted.
#pragma once

#include "simd.h"

namespace wkv {
namespace WKV_ISA {

// One token's inputs side by side: in arrays of their own they would all fall into the same sets of the first cache.
template <class C, int WIDTH>
struct Token7 {
    Row<C, WIDTH> r, w, k, v, kappa, a, z, b;

    template <class E, class X>
    WKV_INLINE void read(const X& x, long at, int n) {
        read_row(static_cast<const E*>(x.r) + at, n, r);
        read_row(static_cast<const C*>(x.log_w) + at, n, w);
        read_row(static_cast<const E*>(x.k) + at, n, k);
        read_row(static_cast<const E*>(x.v) + at, n, v);
        read_row(static_cast<const E*>(x.kappa) + at, n, kappa);
        read_row(static_cast<const E*>(x.a) + at, n, a);
        exponentials(w);
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            z.part[p] = -kappa.part[p];
            b.part[p] = kappa.part[p] * a.part[p];
        }
    }
};

// R rows of the state, from value `first` on, over one token.
template <int R, class C, int WIDTH>
WKV_INLINE void step7(Row<C, WIDTH> (&s)[R], const C (&sz)[R], const Token7<C, WIDTH>& x, int first) {
    for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++)
            s[i].part[p] = s[i].part[p] * x.w.part[p] + (x.b.part[p] * sz[i] + x.k.part[p] * x.v[first + i]);
}

template <int R, class C, int WIDTH>
WKV_INLINE void forward7_rows(const Token7<C, WIDTH>* x, int first, int count, int n, C* state, Row<C, WIDTH>* y) {
    Row<C, WIDTH> s[R];
    for (int i = 0; i < R; i++) s[i].load(state + (first + i) * n, n);
    for (int t = 0; t < count; t++) {
        C sz[R], out[R];
        products(s, x[t].z, sz);
        step7(s, sz, x[t], first);
        products(s, x[t].r, out);
        for (int i = 0; i < R; i++) y[t][first + i] = out[i];
    }
    for (int i = 0; i < R; i++) s[i].save(state + (first + i) * n, n);
}

template <class E, class C, int WIDTH>
void forward7(const Shape& shape, const Forward7& x, int sequence, int head) {
    const int n = shape.head_size;
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    C* state = static_cast<C*>(x.final_state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    const C* initial = static_cast<const C*>(x.state) + (static_cast<long>(sequence) * shape.n_head + head) * states;
    if (state != initial) __builtin_memcpy(state, initial, states * sizeof(C));
    long checkpoint = first_checkpoint(shape.bounds, CPU_INTERVAL, sequence);
    Token7<C, WIDTH> tokens[CPU_INTERVAL];
    Row<C, WIDTH> y[CPU_INTERVAL];
    for (int t = shape.bounds[sequence]; t < shape.bounds[sequence + 1]; t += CPU_INTERVAL, checkpoint++) {
        const int left = shape.bounds[sequence + 1] - t, count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        if (x.checkpoints)
            __builtin_memcpy(static_cast<C*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states, state, states * sizeof(C));
        for (int i = 0; i < count; i++) tokens[i].template read<E>(x, at + i * stride, n);
        int row = 0;
        for (; row + 4 <= n; row += 4) forward7_rows<4>(tokens, row, count, n, state, y);
        for (; row < n; row++) forward7_rows<1>(tokens, row, count, n, state, y);
        for (int i = 0; i < count; i++) write_row(static_cast<E*>(x.y) + at + i * stride, n, y[i]);
    }
}

template <class C, int WIDTH>
struct Gradient7 {
    Row<C, WIDTH> y, r, w, k, v, z, b;
};

// From the checkpoint's rows s and the gradient g of the rows at the interval's end, g at its start; adds to all of d but d.v.
template <int R, class C, int WIDTH>
WKV_INLINE void backward7_rows(const Token7<C, WIDTH>* x, int first, int count, int n, const C* checkpoint, C* gradient,
                           Gradient7<C, WIDTH>* d) {
    Row<C, WIDTH> before[CPU_INTERVAL + 1][R], g[R];
    C sz[CPU_INTERVAL][R];
    for (int i = 0; i < R; i++) {
        before[0][i].load(checkpoint + (first + i) * n, n);
        g[i].load(gradient + (first + i) * n, n);
    }
    for (int t = 0; t < count; t++) {
        Row<C, WIDTH> s[R];
        for (int i = 0; i < R; i++) s[i] = before[t][i];
        products(s, x[t].z, sz[t]);
        step7(s, sz[t], x[t], first);
        for (int i = 0; i < R; i++) before[t + 1][i] = s[i];
    }
    for (int t = count - 1; t >= 0; t--) {
        C d_v[R], d_sz[R];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
            for (int i = 0; i < R; i++) g[i].part[p] += x[t].r.part[p] * d[t].y[first + i];
        products(g, x[t].k, d_v);
        products(g, x[t].b, d_sz);
        for (int i = 0; i < R; i++) d[t].v[first + i] = d_v[i];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto r = d[t].r.part[p], w = d[t].w.part[p], k = d[t].k.part[p], z = d[t].z.part[p], b = d[t].b.part[p];
            for (int i = 0; i < R; i++) {
                const auto s = before[t][i].part[p], grown = g[i].part[p];
                r += before[t + 1][i].part[p] * d[t].y[first + i];
                k += grown * x[t].v[first + i];
                b += grown * sz[t][i];
                w += grown * s;
                z += s * d_sz[i];
                g[i].part[p] = grown * x[t].w.part[p] + x[t].z.part[p] * d_sz[i];
            }
            d[t].r.part[p] = r, d[t].w.part[p] = w, d[t].k.part[p] = k, d[t].z.part[p] = z, d[t].b.part[p] = b;
        }
    }
    for (int i = 0; i < R; i++) g[i].save(gradient + (first + i) * n, n);
}

template <class E, class C, int WIDTH>
void backward7(const Shape& shape, const Backward7& x, int sequence, int head) {
    const int n = shape.head_size;
    const long stride = static_cast<long>(shape.n_head) * n, states = static_cast<long>(n) * n;
    const long own = (static_cast<long>(sequence) * shape.n_head + head) * states;
    C* gradient = static_cast<C*>(x.d_state) + own;
    __builtin_memcpy(gradient, static_cast<const C*>(x.d_final_state) + own, states * sizeof(C));
    const int start = shape.bounds[sequence], n_intervals = (shape.bounds[sequence + 1] - start + CPU_INTERVAL - 1) / CPU_INTERVAL;
    Token7<C, WIDTH> tokens[CPU_INTERVAL];
    Gradient7<C, WIDTH> d[CPU_INTERVAL];
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
        for (; row + 4 <= n; row += 4) backward7_rows<4>(tokens, row, count, n, checkpoint, gradient, d);
        for (; row < n; row++) backward7_rows<1>(tokens, row, count, n, checkpoint, gradient, d);
        for (int i = 0; i < count; i++)
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
                d[i].w.part[p] *= tokens[i].w.part[p];
                d[i].z.part[p] = d[i].b.part[p] * tokens[i].a.part[p] - d[i].z.part[p];
                d[i].b.part[p] *= tokens[i].kappa.part[p];
            }
        for (int i = 0; i < count; i++) {
            const long to = at + i * stride;
            write_row(static_cast<E*>(x.d_r) + to, n, d[i].r);
            write_row(static_cast<C*>(x.d_log_w) + to, n, d[i].w);
            write_row(static_cast<E*>(x.d_k) + to, n, d[i].k);
            write_row(static_cast<E*>(x.d_v) + to, n, d[i].v);
            write_row(static_cast<E*>(x.d_kappa) + to, n, d[i].z);
            write_row(static_cast<E*>(x.d_a) + to, n, d[i].b);
        }
    }
}

}  // namespace WKV_ISA
}  // namespace wkv
