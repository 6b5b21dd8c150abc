// RWKV-7's recurrence on the CPU, one head of one sequence at a time (arXiv:2503.14456, eq. 16-18), S[value][key]:
//     S <- S diag(w_t) + (S z_t) b_t^T + v_t k_t^T,   y_t = S r_t,   z = -kappa, b = kappa * a
// Rows of S do not know of each other: a few of them stay in registers while the tokens of one interval go by. The backward
// takes the rows' history over an interval from its checkpoint anew and walks it in reverse, so that no decay is ever inverted.
#pragma once

#include "simd.h"

namespace wkv {
namespace WKV_ISA {

template <class E, class C, int WIDTH>
struct Tokens7 {
    Row<C, WIDTH> r[CPU_INTERVAL], w[CPU_INTERVAL], k[CPU_INTERVAL], v[CPU_INTERVAL], kappa[CPU_INTERVAL], a[CPU_INTERVAL];
    Row<C, WIDTH> z[CPU_INTERVAL], b[CPU_INTERVAL];

    template <class X>
    inline void read(const X& x, long at, long stride, int count, int n) {
        read_tokens(static_cast<const E*>(x.r) + at, stride, count, n, r);
        read_tokens(static_cast<const C*>(x.log_w) + at, stride, count, n, w);
        read_tokens(static_cast<const E*>(x.k) + at, stride, count, n, k);
        read_tokens(static_cast<const E*>(x.v) + at, stride, count, n, v);
        read_tokens(static_cast<const E*>(x.kappa) + at, stride, count, n, kappa);
        read_tokens(static_cast<const E*>(x.a) + at, stride, count, n, a);
        exponentials(w, count);
        for (int t = 0; t < count; t++)
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
                z[t].part[p] = -kappa[t].part[p];
                b[t].part[p] = kappa[t].part[p] * a[t].part[p];
            }
    }
};

// R rows of the state, from value `first` on, over one token.
template <int R, class E, class C, int WIDTH>
inline void step7(Row<C, WIDTH> (&s)[R], const C (&sz)[R], const Tokens7<E, C, WIDTH>& x, int t, int first) {
    for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++)
            s[i].part[p] = s[i].part[p] * x.w[t].part[p] + (x.b[t].part[p] * sz[i] + x.k[t].part[p] * x.v[t][first + i]);
}

template <int R, class E, class C, int WIDTH>
inline void forward7_rows(const Tokens7<E, C, WIDTH>& x, int first, int count, int n, C* state, Row<C, WIDTH>* y) {
    Row<C, WIDTH> s[R];
    for (int i = 0; i < R; i++) s[i].load(state + (first + i) * n, n);
    for (int t = 0; t < count; t++) {
        C sz[R], out[R];
        products(s, x.z[t], sz);
        step7(s, sz, x, t, first);
        products(s, x.r[t], out);
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
    __builtin_memcpy(state, initial, states * sizeof(C));
    long checkpoint = first_checkpoint(shape.bounds, CPU_INTERVAL, sequence);
    Tokens7<E, C, WIDTH> tokens;
    Row<C, WIDTH> y[CPU_INTERVAL];
    for (int t = shape.bounds[sequence]; t < shape.bounds[sequence + 1]; t += CPU_INTERVAL, checkpoint++) {
        const int left = shape.bounds[sequence + 1] - t, count = left < CPU_INTERVAL ? left : CPU_INTERVAL;
        const long at = t * stride + head * n;
        if (x.checkpoints)
            __builtin_memcpy(static_cast<C*>(x.checkpoints) + (checkpoint * shape.n_head + head) * states, state, states * sizeof(C));
        tokens.read(x, at, stride, count, n);
        int row = 0;
        for (; row + 4 <= n; row += 4) forward7_rows<4>(tokens, row, count, n, state, y);
        for (; row < n; row++) forward7_rows<1>(tokens, row, count, n, state, y);
        write_tokens(static_cast<E*>(x.y) + at, stride, count, n, y);
    }
}

template <class C, int WIDTH>
struct Gradients7 {
    Row<C, WIDTH> y[CPU_INTERVAL], r[CPU_INTERVAL], w[CPU_INTERVAL], k[CPU_INTERVAL], v[CPU_INTERVAL], z[CPU_INTERVAL], b[CPU_INTERVAL];
};

// From the checkpoint's rows s and the gradient g of the rows at the interval's end, g at its start; adds to all of d but d.v.
template <int R, class E, class C, int WIDTH>
inline void backward7_rows(const Tokens7<E, C, WIDTH>& x, int first, int count, int n, const C* checkpoint, C* gradient,
                           Gradients7<C, WIDTH>& d) {
    Row<C, WIDTH> before[CPU_INTERVAL + 1][R], g[R];
    C sz[CPU_INTERVAL][R];
    for (int i = 0; i < R; i++) {
        before[0][i].load(checkpoint + (first + i) * n, n);
        g[i].load(gradient + (first + i) * n, n);
    }
    for (int t = 0; t < count; t++) {
        Row<C, WIDTH> s[R];
        for (int i = 0; i < R; i++) s[i] = before[t][i];
        products(s, x.z[t], sz[t]);
        step7(s, sz[t], x, t, first);
        for (int i = 0; i < R; i++) before[t + 1][i] = s[i];
    }
    for (int t = count - 1; t >= 0; t--) {
        C d_v[R], d_sz[R];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++)
            for (int i = 0; i < R; i++) g[i].part[p] += x.r[t].part[p] * d.y[t][first + i];
        products(g, x.k[t], d_v);
        products(g, x.b[t], d_sz);
        for (int i = 0; i < R; i++) d.v[t][first + i] = d_v[i];
        for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
            auto r = d.r[t].part[p], w = d.w[t].part[p], k = d.k[t].part[p], z = d.z[t].part[p], b = d.b[t].part[p];
            for (int i = 0; i < R; i++) {
                const auto s = before[t][i].part[p], grown = g[i].part[p];
                r += before[t + 1][i].part[p] * d.y[t][first + i];
                k += grown * x.v[t][first + i];
                b += grown * sz[t][i];
                w += grown * s;
                z += s * d_sz[i];
                g[i].part[p] = grown * x.w[t].part[p] + x.z[t].part[p] * d_sz[i];
            }
            d.r[t].part[p] = r, d.w[t].part[p] = w, d.k[t].part[p] = k, d.z[t].part[p] = z, d.b[t].part[p] = b;
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
    Tokens7<E, C, WIDTH> tokens;
    Gradients7<C, WIDTH> d;
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
        for (; row + 4 <= n; row += 4) backward7_rows<4>(tokens, row, count, n, checkpoint, gradient, d);
        for (; row < n; row++) backward7_rows<1>(tokens, row, count, n, checkpoint, gradient, d);
        for (int i = 0; i < count; i++)
            for (int p = 0; p < Row<C, WIDTH>::COUNT; p++) {
                d.w[i].part[p] *= tokens.w[i].part[p];
                d.z[i].part[p] = d.b[i].part[p] * tokens.a[i].part[p] - d.z[i].part[p];
                d.b[i].part[p] *= tokens.kappa[i].part[p];
            }
        write_tokens(static_cast<E*>(x.d_r) + at, stride, count, n, d.r);
        write_tokens(static_cast<C*>(x.d_log_w) + at, stride, count, n, d.w);
        write_tokens(static_cast<E*>(x.d_k) + at, stride, count, n, d.k);
        write_tokens(static_cast<E*>(x.d_v) + at, stride, count, n, d.v);
        write_tokens(static_cast<E*>(x.d_kappa) + at, stride, count, n, d.z);
        write_tokens(static_cast<E*>(x.d_a) + at, stride, count, n, d.b);
    }
}

}  // namespace WKV_ISA
}  // namespace wkv
