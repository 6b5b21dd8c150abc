// Vectors of one instruction set, for kernels compiled once per set: WKV_BYTES is the register's width, WKV_ISA the namespace.
// Includes no standard header, so that no function of theirs is compiled for a set that the machine may lack.
#pragma once

#include "arguments.h"

namespace wkv {
namespace WKV_ISA {

// Tokens between two checkpoints: their rows' history stays in the first cache.
constexpr int CPU_INTERVAL = 16;

// The kernels are fast only where all of this is inlined, registers and all.
#define WKV_INLINE inline __attribute__((always_inline))

template <class C>
struct Vector {
    typedef C type __attribute__((vector_size(WKV_BYTES)));
    typedef C unaligned __attribute__((vector_size(WKV_BYTES), aligned(sizeof(C)), may_alias));
    static constexpr int LANES = WKV_BYTES / sizeof(C);
};

struct bf16 {
    unsigned short bits;
};

WKV_INLINE float read(const float* x) { return *x; }
WKV_INLINE double read(const double* x) { return *x; }
WKV_INLINE float read(const bf16* x) {
    unsigned bits = static_cast<unsigned>(x->bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
WKV_INLINE void write(float* at, float x) { *at = x; }
WKV_INLINE void write(double* at, double x) { *at = x; }
WKV_INLINE void write(bf16* at, float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    // To nearest, ties to even; a NaN stays one.
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    at->bits = static_cast<unsigned short>(bits >> 16);
}

// The vectors of WIDTH elements, a padded head, of which the first n exist.
template <class C, int WIDTH>
struct Row {
    typedef typename Vector<C>::type vec;
    static constexpr int COUNT = WIDTH / Vector<C>::LANES;
    vec part[COUNT];

    WKV_INLINE void load(const C* from, int n) {
        if (n == WIDTH) {
            for (int i = 0; i < COUNT; i++) part[i] = *reinterpret_cast<const typename Vector<C>::unaligned*>(from + i * Vector<C>::LANES);
        } else {
            C* to = reinterpret_cast<C*>(part);
            for (int i = 0; i < WIDTH; i++) to[i] = i < n ? from[i] : C(0);
        }
    }
    WKV_INLINE void save(C* to, int n) const {
        if (n == WIDTH) {
            for (int i = 0; i < COUNT; i++) *reinterpret_cast<typename Vector<C>::unaligned*>(to + i * Vector<C>::LANES) = part[i];
        } else {
            const C* from = reinterpret_cast<const C*>(part);
            for (int i = 0; i < n; i++) to[i] = from[i];
        }
    }
    WKV_INLINE C operator[](int i) const { return reinterpret_cast<const C*>(part)[i]; }
    WKV_INLINE C& operator[](int i) { return reinterpret_cast<C*>(part)[i]; }
};

template <class E, class C, int WIDTH>
WKV_INLINE void read_row(const E* from, int n, Row<C, WIDTH>& to) {
    if (n == WIDTH) {
        for (int i = 0; i < WIDTH; i++) to[i] = read(from + i);
    } else {
        for (int i = 0; i < WIDTH; i++) to[i] = i < n ? C(read(from + i)) : C(0);
    }
}

template <class E, class C, int WIDTH>
WKV_INLINE void write_row(E* to, int n, const Row<C, WIDTH>& from) {
    if (n == WIDTH) {
        for (int i = 0; i < WIDTH; i++) write(to + i, from[i]);
    } else {
        for (int i = 0; i < n; i++) write(to + i, from[i]);
    }
}

template <int WIDTH>
WKV_INLINE void exponentials(Row<double, WIDTH>& row) {
    for (int i = 0; i < WIDTH; i++) row[i] = __builtin_exp(row[i]);
}

// For x <= 0, within 2 units in the last place: e^x = 2^n e^f, |f| <= ln(2) / 2, by the Taylor series.
template <int WIDTH>
WKV_INLINE void exponentials(Row<float, WIDTH>& row) {
    typedef Vector<float>::type vec;
    typedef int whole __attribute__((vector_size(WKV_BYTES)));
    for (int i = 0; i < Row<float, WIDTH>::COUNT; i++) {
        const vec least = vec{} - 104.0f, x = row.part[i] < least ? least : row.part[i];
        const whole n = __builtin_convertvector(x * 1.44269504f - 0.5f, whole);
        const vec power = __builtin_convertvector(n, vec), f = x - power * 0.693145752f - power * 1.42860677e-6f;
        vec p = f * (1.0f / 5040) + 1.0f / 720;
        p = p * f + 1.0f / 120, p = p * f + 1.0f / 24, p = p * f + 1.0f / 6, p = p * f + 0.5f;
        p = p * f * f + f + 1.0f;
        // In two steps, for results that are subnormal.
        const whole half = n / 2, low = (half + 127) << 23, high = (n - half + 127) << 23;
        row.part[i] = p * (vec)low * (vec)high;
    }
}

// Sums over the lanes of R vectors.
template <class C, int R>
WKV_INLINE void lane_sums(const typename Vector<C>::type (&x)[R], C (&sums)[R]) {
    for (int r = 0; r < R; r++) {
        C sum = 0;
        for (int i = 0; i < Vector<C>::LANES; i++) sum += x[r][i];
        sums[r] = sum;
    }
}

#if WKV_BYTES == 64 && !defined(__clang__)
// Four at a time: each step halves two vectors into one, three steps in all instead of four for each.
template <>
WKV_INLINE void lane_sums<float, 4>(const Vector<float>::type (&x)[4], float (&sums)[4]) {
    typedef Vector<float>::type vec;
    typedef int mask __attribute__((vector_size(64)));
    const mask low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const mask high = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    vec a = __builtin_shuffle(x[0], x[1], low) + __builtin_shuffle(x[0], x[1], high);
    vec b = __builtin_shuffle(x[2], x[3], low) + __builtin_shuffle(x[2], x[3], high);
    const mask even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const mask odd = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
    vec c = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    const mask by_two = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
    const mask by_one = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    c += __builtin_shuffle(c, by_two);
    c += __builtin_shuffle(c, by_one);
    for (int r = 0; r < 4; r++) sums[r] = c[4 * r];
}
#endif

// The products of R rows with one row, or each with its own.
template <int R, class C, int WIDTH>
WKV_INLINE void products(const Row<C, WIDTH> (&x)[R], const Row<C, WIDTH>& y, C (&sums)[R]) {
    typename Vector<C>::type dot[R];
    for (int i = 0; i < R; i++) dot[i] = x[i].part[0] * y.part[0];
    for (int p = 1; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) dot[i] += x[i].part[p] * y.part[p];
    lane_sums<C, R>(dot, sums);
}

template <int R, class C, int WIDTH>
WKV_INLINE void products(const Row<C, WIDTH> (&x)[R], const Row<C, WIDTH> (&y)[R], C (&sums)[R]) {
    typename Vector<C>::type dot[R];
    for (int i = 0; i < R; i++) dot[i] = x[i].part[0] * y[i].part[0];
    for (int p = 1; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) dot[i] += x[i].part[p] * y[i].part[p];
    lane_sums<C, R>(dot, sums);
}

template <class C, int WIDTH>
WKV_INLINE C product(const Row<C, WIDTH>& x, const Row<C, WIDTH>& y) {
    C sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i] * y[i];
    return sum;
}

template <class C, int WIDTH>
WKV_INLINE C product3(const Row<C, WIDTH>& x, const Row<C, WIDTH>& y, const Row<C, WIDTH>& z) {
    C sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i] * y[i] * z[i];
    return sum;
}

}  // namespace WKV_ISA
}  // namespace wkv
