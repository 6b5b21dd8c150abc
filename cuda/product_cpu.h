// y = x W^T on the CPU, one panel of 64 outputs and up to 96 rows a call; layouts in decode_kernels.h.
// Each output is summed over its inputs from first to last in float32, however many rows are computed together.
// What is held in codes or halves is spread out for 64 inputs at a time, in the first cache, and then used for all rows.
#pragma once

#include "decode_kernels.h"
#include "simd.h"
#if WKV_BYTES > 16 && defined(__x86_64__) && !defined(__clang__)
#define WKV_INTRINSICS
#include <immintrin.h>
#endif

namespace wkv {
namespace WKV_ISA {

typedef Vector<float>::type vec;
typedef unsigned uvec __attribute__((vector_size(WKV_BYTES)));
typedef int ivec __attribute__((vector_size(WKV_BYTES)));
typedef Vector<float>::unaligned loose;
constexpr int LANES = Vector<float>::LANES;
constexpr int ABREAST = PANEL_OUT / LANES < 4 ? PANEL_OUT / LANES : 4;  // vectors of outputs in registers
constexpr int ROWS = WKV_BYTES == 64 ? 6 : 3;                           // rows in registers
constexpr int SPREAD = 64, DIRECT = 256;                                // inputs at a time, spread out or read where they lie

#ifdef WKV_BF16
typedef unsigned pair;  // two bfloat16 of x
#else
struct pair { float low, high; };  // the same, rounded, each as a float
#endif

WKV_INLINE uvec rounded(vec x) {  // to bfloat16, in the upper halves; to nearest, ties to even
    const uvec bits = (uvec)x;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

template <int R>
WKV_INLINE void accumulate(const float* x, long stride, const float* w, int count, float* sums) {
    for (int column = 0; column < PANEL_OUT; column += ABREAST * LANES) {
        vec sum[R][ABREAST];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) sum[r][j] = *(const vec*)(sums + r * PANEL_OUT + column + j * LANES);
        for (int k = 0; k < count; k++) {
            const float* at = w + static_cast<long>(k) * PANEL_OUT + column;
            __builtin_prefetch(at + 24 * PANEL_OUT);
            for (int r = 0; r < R; r++)
                for (int j = 0; j < ABREAST; j++) sum[r][j] += *(const loose*)(at + j * LANES) * x[r * stride + k];
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) *(vec*)(sums + r * PANEL_OUT + column + j * LANES) = sum[r][j];
    }
}

template <int R>
WKV_INLINE void accumulate(const pair* x, long stride, const unsigned* w, int count, float* sums) {
    for (int column = 0; column < PANEL_OUT; column += ABREAST * LANES) {
        vec sum[R][ABREAST];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) sum[r][j] = *(const vec*)(sums + r * PANEL_OUT + column + j * LANES);
        for (int k = 0; k < count; k++) {
            const unsigned* at = w + static_cast<long>(k) * PANEL_OUT + column;
            __builtin_prefetch(at + 24 * PANEL_OUT);
            for (int j = 0; j < ABREAST; j++) {
                uvec both;
                __builtin_memcpy(&both, at + j * LANES, WKV_BYTES);
#ifdef WKV_BF16
                for (int r = 0; r < R; r++)
                    sum[r][j] = (vec)_mm512_dpbf16_ps((__m512)sum[r][j], (__m512bh)both,
                                                      (__m512bh)_mm512_set1_epi32(x[r * stride + k]));
#else
                const vec low = (vec)(both << 16), high = (vec)(both & 0xffff0000u);
                for (int r = 0; r < R; r++) {
                    sum[r][j] += low * x[r * stride + k].low;
                    sum[r][j] += high * x[r * stride + k].high;
                }
#endif
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) *(vec*)(sums + r * PANEL_OUT + column + j * LANES) = sum[r][j];
    }
}

template <class X, class W>
WKV_INLINE void accumulate_rows(const X* x, long stride, const W* w, int count, int rows, float* sums) {
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS) accumulate<ROWS>(x + row * stride, stride, w, count, sums + row * PANEL_OUT);
    x += row * stride, sums += row * PANEL_OUT;
    switch (rows - row) {
        case 1: accumulate<1>(x, stride, w, count, sums); break;
        case 2: accumulate<2>(x, stride, w, count, sums); break;
#if WKV_BYTES == 64
        case 3: accumulate<3>(x, stride, w, count, sums); break;
        case 4: accumulate<4>(x, stride, w, count, sums); break;
        case 5: accumulate<5>(x, stride, w, count, sums); break;
#endif
    }
}

// The 16 values of NF4 (Dettmers et al. 2023, appendix E), as bitsandbytes has them.
constexpr float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                           -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                           0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                           0.7229568362236023f, 1.0f};

WKV_INLINE vec nf4_values(ivec code) {
#if WKV_BYTES == 64 && !defined(__clang__)
    vec table;
    __builtin_memcpy(&table, NF4, WKV_BYTES);
    return __builtin_shuffle(table, code);
#else
    vec value;
    for (int i = 0; i < LANES; i++) value[i] = NF4[code[i]];
    return value;
#endif
}

// LANES bytes as numbers; the compiler's own conversion of bytes goes one by one.
WKV_INLINE ivec widen(const signed char* from) {
#if defined(WKV_INTRINSICS) && WKV_BYTES == 64
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(WKV_INTRINSICS)
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    ivec to;
    for (int i = 0; i < LANES; i++) to[i] = from[i];
    return to;
#endif
}

// The weights of one input and LANES outputs from `column` on.
WKV_INLINE vec spread_int8(const signed char* codes, const float* scales, int column) {
    return __builtin_convertvector(widen(codes + column), vec) * *(const loose*)(scales + column);
}

WKV_INLINE vec spread_nf4(const signed char* codes, const float* scales, int column) {
    const ivec both = widen(codes + column % 32);
    return nf4_values((column < 32 ? both : both >> 4) & 15) * *(const loose*)(scales + column);
}

// IEEE halves in the low 16 bits, exactly, subnormals too; an infinity becomes 65536.
WKV_INLINE vec spread_float16(uvec half) {
    return (vec)((uvec)((vec)((half & 0x7fffu) << 13) * 0x1p112f) | (half & 0x8000u) << 16);
}

// `count` inputs of a panel, as floats, or two by two in bfloat16.
template <class F>
WKV_INLINE void spread_codes(const signed char* codes, const float* scales, int bytes, int count, bool in_bfloat16, float* spread,
                             F weights) {
    for (int i = 0; i < count; i += 1 + in_bfloat16) {
        const signed char* at = codes + static_cast<long>(i) * bytes;
        __builtin_prefetch(at + 32 * bytes);
        for (int j = 0; j < PANEL_OUT; j += LANES) {
            if (!in_bfloat16) {
                *(vec*)(spread + i * PANEL_OUT + j) = weights(at, scales, j);
            } else {
                const uvec low = rounded(weights(at, scales, j)) >> 16;
                *(uvec*)(spread + i / 2 * PANEL_OUT + j) = i + 1 < count ? low | rounded(weights(at + bytes, scales, j)) : low;
            }
        }
    }
}

void product(const Product& p, int panel, int first_row, int last_row) {
    alignas(64) float sums[ROWS_AT_ONCE * PANEL_OUT], spread[SPREAD * PANEL_OUT];
    const int rows = last_row - first_row, even = (p.in + 1) / 2;
    __builtin_memset(sums, 0, sizeof(float) * rows * PANEL_OUT);
    const float* x = static_cast<const float*>(p.x) + static_cast<long>(first_row) * p.in;
    const pair* pairs = static_cast<const pair*>(p.x) + static_cast<long>(first_row) * even;
    if (p.panel == PANEL_FLOAT32) {
        const float* w = static_cast<const float*>(p.panels) + static_cast<long>(panel) * p.in * PANEL_OUT;
        for (int k = 0; k < p.in; k += DIRECT)
            accumulate_rows(x + k, p.in, w + static_cast<long>(k) * PANEL_OUT, p.in - k < DIRECT ? p.in - k : DIRECT, rows, sums);
    } else if (p.panel == PANEL_BFLOAT16) {
        const unsigned* w = static_cast<const unsigned*>(p.panels) + static_cast<long>(panel) * even * PANEL_OUT;
        for (int k = 0; k < even; k += DIRECT)
            accumulate_rows(pairs + k, even, w + static_cast<long>(k) * PANEL_OUT, even - k < DIRECT ? even - k : DIRECT, rows, sums);
    } else if (p.panel == PANEL_FLOAT16) {
        const unsigned* w = static_cast<const unsigned*>(p.panels) + static_cast<long>(panel) * even * PANEL_OUT;
        for (int k = 0; k < p.in; k += SPREAD) {
            const int count = p.in - k < SPREAD ? p.in - k : SPREAD;
            for (int i = 0; i < count; i++)
                for (int j = 0; j < PANEL_OUT; j += LANES) {
                    uvec both;
                    __builtin_memcpy(&both, w + static_cast<long>((k + i) / 2) * PANEL_OUT + j, WKV_BYTES);
                    *(vec*)(spread + i * PANEL_OUT + j) = spread_float16(i % 2 ? both >> 16 : both & 0xffffu);
                }
            accumulate_rows(x + k, p.in, spread, count, rows, sums);
        }
    } else {
        const bool nf4 = p.panel == PANEL_NF4;
        const int bytes = nf4 ? PANEL_OUT / 2 : PANEL_OUT;
        const signed char* codes = static_cast<const signed char*>(p.panels) + static_cast<long>(panel) * p.in * bytes;
        const float* scales = p.scales + static_cast<long>(panel) * (nf4 ? p.in / 64 : 1) * PANEL_OUT;
        for (int k = 0; k < p.in; k += SPREAD) {
            const int count = p.in - k < SPREAD ? p.in - k : SPREAD;
            if (nf4)
                spread_codes(codes + static_cast<long>(k) * bytes, scales, bytes, count, p.in_bfloat16, spread, spread_nf4);
            else
                spread_codes(codes + static_cast<long>(k) * bytes, scales, bytes, count, p.in_bfloat16, spread, spread_int8);
            if (p.in_bfloat16)
                accumulate_rows(pairs + k / 2, even, reinterpret_cast<const unsigned*>(spread), (count + 1) / 2, rows, sums);
            else
                accumulate_rows(x + k, p.in, spread, count, rows, sums);
            if (nf4) scales += PANEL_OUT;
        }
    }
    const int first = panel * PANEL_OUT, width = p.out - first < PANEL_OUT ? p.out - first : PANEL_OUT;
    for (int row = 0; row < rows; row++) {
        const long at = static_cast<long>(first_row + row) * p.out + first;
        float* sum = sums + row * PANEL_OUT;
        for (int j = 0; j < PANEL_OUT; j += LANES) *(vec*)(sum + j) = activate(*(const vec*)(sum + j), p.activation);
        if (!p.add)
            for (int j = 0; j < width; j++) p.y[at + j] = sum[j];
        else if (!p.gate)
            for (int j = 0; j < width; j++) p.y[at + j] += sum[j];
        else
            for (int j = 0; j < width; j++) p.y[at + j] += p.gate[at + j] * sum[j];
    }
}

void round_row(const float* x, void* to, int in) {
    for (int k = 0; k < in; k += 2) {
        bf16 low{}, high{};
        write(&low, x[k]);
        write(&high, k + 1 < in ? x[k + 1] : 0.0f);
#ifdef WKV_BF16
        static_cast<pair*>(to)[k / 2] = low.bits | static_cast<unsigned>(high.bits) << 16;
#else
        static_cast<pair*>(to)[k / 2] = {read(&low), read(&high)};
#endif
    }
}

}  // namespace WKV_ISA
}  // namespace wkv
