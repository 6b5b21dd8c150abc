// Vectors of one instruction set, for kernels compiled once per set: WKV_BYTES is the register's width, WKV_ISA the namespace.
// Includes no standard header, so that no function of theirs is compiled for a set that the machine may lack.
#pragma once

#include "arguments.h"

namespace wkv {
namespace WKV_ISA {

// Tokens between two checkpoints: their rows' history stays in the first cache.
constexpr int CPU_INTERVAL = 16;

template <class C>
struct Vector {
    typedef C type __attribute__((vector_size(WKV_BYTES)));
    typedef C unaligned __attribute__((vector_size(WKV_BYTES), aligned(sizeof(C)), may_alias));
    static constexpr int LANES = WKV_BYTES / sizeof(C);
};

struct bf16 {
    unsigned short bits;
};

inline float read(const float* x) { return *x; }
inline double read(const double* x) { return *x; }
inline float read(const bf16* x) {
    unsigned bits = static_cast<unsigned>(x->bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
inline void write(float* at, float x) { *at = x; }
inline void write(double* at, double x) { *at = x; }
inline void write(bf16* at, float x) {
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

    inline void load(const C* from, int n) {
        if (n == WIDTH) {
            for (int i = 0; i < COUNT; i++) part[i] = *reinterpret_cast<const typename Vector<C>::unaligned*>(from + i * Vector<C>::LANES);
        } else {
            C* to = reinterpret_cast<C*>(part);
            for (int i = 0; i < WIDTH; i++) to[i] = i < n ? from[i] : C(0);
        }
    }
    inline void save(C* to, int n) const {
        if (n == WIDTH) {
            for (int i = 0; i < COUNT; i++) *reinterpret_cast<typename Vector<C>::unaligned*>(to + i * Vector<C>::LANES) = part[i];
        } else {
            const C* from = reinterpret_cast<const C*>(part);
            for (int i = 0; i < n; i++) to[i] = from[i];
        }
    }
    inline C operator[](int i) const { return reinterpret_cast<const C*>(part)[i]; }
    inline C& operator[](int i) { return reinterpret_cast<C*>(part)[i]; }
};

// x[token][H][N] of one head, `count` tokens, as rows.
template <class E, class C, int WIDTH>
inline void read_tokens(const E* x, long stride, int count, int n, Row<C, WIDTH>* to) {
    for (int t = 0; t < count; t++) {
        C* row = reinterpret_cast<C*>(to[t].part);
        for (int i = 0; i < n; i++) row[i] = read(x + t * stride + i);
        for (int i = n; i < WIDTH; i++) row[i] = C(0);
    }
}

template <class E, class C, int WIDTH>
inline void write_tokens(E* x, long stride, int count, int n, const Row<C, WIDTH>* from) {
    for (int t = 0; t < count; t++)
        for (int i = 0; i < n; i++) write(x + t * stride + i, from[t][i]);
}

inline double exponential(double x) { return __builtin_exp(x); }
// For x <= 0, within 2 units in the last place: e^x = 2^n e^f, |f| <= ln(2) / 2, by the Taylor series. Vectorizes, as libm's would not.
inline float exponential(float x) {
    x = x < -104.0f ? -104.0f : x;
    float n = static_cast<float>(static_cast<int>(x * 1.44269504f - 0.5f));
    float f = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720, p = p * f + 1.0f / 120, p = p * f + 1.0f / 24, p = p * f + 1.0f / 6, p = p * f + 0.5f;
    p = p * f * f + f + 1.0f;
    // In two steps, for results that are subnormal.
    int half = static_cast<int>(n) / 2, bits[2] = {(half + 127) << 23, (static_cast<int>(n) - half + 127) << 23};
    float scale[2];
    __builtin_memcpy(scale, bits, 8);
    return p * scale[0] * scale[1];
}

template <class C, int WIDTH>
inline void exponentials(Row<C, WIDTH>* rows, int count) {
    for (int t = 0; t < count; t++) {
        C* row = reinterpret_cast<C*>(rows[t].part);
        for (int i = 0; i < WIDTH; i++) row[i] = exponential(row[i]);
    }
}

// Sums over the lanes of R vectors.
template <class C, int R>
inline void lane_sums(const typename Vector<C>::type (&x)[R], C (&sums)[R]) {
    for (int r = 0; r < R; r++) {
        C sum = 0;
        for (int i = 0; i < Vector<C>::LANES; i++) sum += x[r][i];
        sums[r] = sum;
    }
}

#if WKV_BYTES == 64 && !defined(__clang__)
// Four at a time: each step halves two vectors into one, three steps in all instead of four for each.
template <>
inline void lane_sums<float, 4>(const Vector<float>::type (&x)[4], float (&sums)[4]) {
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
inline void products(const Row<C, WIDTH> (&x)[R], const Row<C, WIDTH>& y, C (&sums)[R]) {
    typename Vector<C>::type dot[R];
    for (int i = 0; i < R; i++) dot[i] = x[i].part[0] * y.part[0];
    for (int p = 1; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) dot[i] += x[i].part[p] * y.part[p];
    lane_sums<C, R>(dot, sums);
}

template <int R, class C, int WIDTH>
inline void products(const Row<C, WIDTH> (&x)[R], const Row<C, WIDTH> (&y)[R], C (&sums)[R]) {
    typename Vector<C>::type dot[R];
    for (int i = 0; i < R; i++) dot[i] = x[i].part[0] * y[i].part[0];
    for (int p = 1; p < Row<C, WIDTH>::COUNT; p++)
        for (int i = 0; i < R; i++) dot[i] += x[i].part[p] * y[i].part[p];
    lane_sums<C, R>(dot, sums);
}

template <class C, int WIDTH>
inline C product(const Row<C, WIDTH>& x, const Row<C, WIDTH>& y) {
    C sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i] * y[i];
    return sum;
}

template <class C, int WIDTH>
inline C product3(const Row<C, WIDTH>& x, const Row<C, WIDTH>& y, const Row<C, WIDTH>& z) {
    C sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i] * y[i] * z[i];
    return sum;
}

}  // namespace WKV_ISA
}  // namespace wkv
