// y = x W^T on the CPU, one panel of 64 outputs and up to 96 rows a call; layouts in decode_kernels.h.
// Each output is summed over its inputs from first to last in float32, however many rows are computed together. Codes and halves
// become numbers in registers for a few rows, and for more in the first cache, a chunk at a time; their scales multiply sums.
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
typedef Vector<float>::unaligned loose;
constexpr int LANES = Vector<float>::LANES;
constexpr int ABREAST = PANEL_OUT / LANES < 4 ? PANEL_OUT / LANES : 4;  // vectors of outputs in registers
constexpr int ROWS = WKV_BYTES == 64 ? 6 : 3;                           // rows in registers
constexpr int BLOCK = 64, DIRECT = 256;                                 // inputs at a time, spread out or read where they lie

// Readers: how each kind of panel gives weights, a vector of outputs at a time, to be multiplied with one X of each row: an input,
// or two of them in bfloat16. A `Raw` holds STEPS of them in turn; CHUNK of them are used for all rows before the next.
// Nothing is fetched ahead by instruction: the processor by itself does it better.
template <class Held, class Input, class Loaded, int IN_TURN, int AT_ONCE>
struct Reading {
    typedef Input X;
    typedef Loaded Raw;
    static constexpr int STEPS = IN_TURN, CHUNK = AT_ONCE;
    const Held* panel;
    WKV_INLINE Raw weight(Raw raw, int) const { return raw; }
};

struct Float32 : Reading<float, float, vec, 1, DIRECT> {
    WKV_INLINE Raw load(long k, int column) const { return *(const loose*)(panel + k * PANEL_OUT + column); }
};
// How weights are read that were spread out.
WKV_INLINE Float32 read_again(const float* spread) { return {spread}; }

WKV_INLINE uvec load_bits(const unsigned* from) {
    uvec bits;
    __builtin_memcpy(&bits, from, WKV_BYTES);
    return bits;
}

// IEEE halves in the low 16 bits, exactly, subnormals too; an infinity becomes 65536.
WKV_INLINE vec from_float16(uvec half) {
    return (vec)((uvec)((vec)((half & 0x7fffu) << 13) * 0x1p112f) | (half & 0x8000u) << 16);
}

// Two inputs side by side, read one at a time.
template <bool BFLOAT16>
struct Half : Reading<unsigned, float, uvec, 1, BLOCK> {
    WKV_INLINE Raw load(long k, int column) const { return load_bits(panel + k / 2 * PANEL_OUT + column) >> (k % 2 * 16); }
    WKV_INLINE vec weight(Raw raw, int) const { return BFLOAT16 ? (vec)(raw << 16) : from_float16(raw & 0xffffu); }
};

// LANES bytes as numbers; the compiler's own conversion of bytes goes one by one.
WKV_INLINE vec numbers(const signed char* from) {
#if defined(WKV_INTRINSICS) && WKV_BYTES == 64
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(WKV_INTRINSICS)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    vec to;
    for (int i = 0; i < LANES; i++) to[i] = from[i];
    return to;
#endif
}

struct Int8 : Reading<signed char, float, vec, 1, BLOCK> {
    WKV_INLINE Raw load(long k, int column) const { return numbers(panel + k * PANEL_OUT + column); }
};

// The 16 values of NF4 (Dettmers et al. 2023, appendix E), as bitsandbytes has them.
constexpr float NF4_VALUES[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                  -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                  0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                  0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

WKV_INLINE vec nf4_values(uvec code) {  // by the lowest four bits
#if defined(WKV_INTRINSICS) && WKV_BYTES == 64
    return (vec)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(NF4_VALUES));
#elif defined(WKV_INTRINSICS)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_VALUES), (__m256i)code);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_VALUES + 8), (__m256i)code);
    return (vec)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
    vec value;
    for (int i = 0; i < LANES; i++) value[i] = NF4_VALUES[code[i] & 15];
    return value;
#endif
}

struct NF4 : Reading<unsigned, float, uvec, 8, BLOCK> {
    WKV_INLINE Raw load(long k, int column) const { return load_bits(panel + k / 8 * PANEL_OUT + column); }
    WKV_INLINE vec weight(Raw raw, int step) const { return nf4_values(raw >> (step % 2 * 16 + step / 2 * 4)); }
};

WKV_INLINE void multiply_add(vec& sum, vec weight, float x) { sum += weight * x; }

#ifdef WKV_BF16
struct Pairs : Reading<unsigned, unsigned, uvec, 1, DIRECT> {
    WKV_INLINE Raw load(long k, int column) const { return load_bits(panel + k * PANEL_OUT + column); }
};
WKV_INLINE Pairs read_again(const unsigned* spread) { return {spread}; }

struct Int8Pairs : Reading<signed char, unsigned, uvec, 1, BLOCK / 2> {  // codes are exact in bfloat16
    WKV_INLINE Raw load(long k, int column) const {
        const signed char* at = panel + 2 * k * PANEL_OUT + column;
        return (uvec)numbers(at) >> 16 | (uvec)numbers(at + PANEL_OUT);
    }
};

constexpr struct Bfloat16Values {  // twice, as a look-up goes by five bits
    unsigned short bits[32];
    constexpr Bfloat16Values() : bits() {
        for (int i = 0; i < 32; i++) {
            const unsigned whole = __builtin_bit_cast(unsigned, NF4_VALUES[i % 16]);
            bits[i] = static_cast<unsigned short>((whole + 0x7fffu + (whole >> 16 & 1u)) >> 16);
        }
    }
} NF4_BFLOAT16;

struct NF4Pairs : Reading<unsigned, unsigned, uvec, 4, BLOCK / 2> {
    WKV_INLINE Raw load(long k, int column) const { return load_bits(panel + k / 4 * PANEL_OUT + column); }
    WKV_INLINE uvec weight(Raw raw, int step) const {
        return (uvec)_mm512_permutexvar_epi16((__m512i)(raw >> (4 * step)), _mm512_loadu_si512(NF4_BFLOAT16.bits));
    }
};

WKV_INLINE void multiply_add(vec& sum, uvec weight, unsigned x) {
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(x));
}
#endif

// Adds to the sums of R rows what `count` steps from `k` on add to them, times `scales` where there are any.
template <int R, class Reader, class X>
WKV_INLINE void accumulate(const Reader& weights, int k, int count, const X* x, long stride, const float* scales, float* sums) {
    for (int column = 0; column < PANEL_OUT; column += ABREAST * LANES) {
        vec sum[R][ABREAST];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) sum[r][j] = scales ? vec{} : *(const vec*)(sums + r * PANEL_OUT + column + j * LANES);
        for (int i = 0; i < count; i += Reader::STEPS) {
            typename Reader::Raw raw[ABREAST];
            for (int j = 0; j < ABREAST; j++) raw[j] = weights.load(k + i, column + j * LANES);
            for (int step = 0; step < Reader::STEPS; step++)
                for (int j = 0; j < ABREAST; j++) {
                    const auto weight = weights.weight(raw[j], step);
                    for (int r = 0; r < R; r++) multiply_add(sum[r][j], weight, x[r * stride + i + step]);
                }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < ABREAST; j++) {
                vec* to = (vec*)(sums + r * PANEL_OUT + column + j * LANES);
                *to = scales ? *to + sum[r][j] * *(const loose*)(scales + column + j * LANES) : sum[r][j];
            }
    }
}

template <class Reader, class X>
WKV_INLINE void accumulate_rows(const Reader& weights, int k, int count, const X* x, long stride, int rows, const float* scales,
                                float* sums) {
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        accumulate<ROWS>(weights, k, count, x + row * stride, stride, scales, sums + row * PANEL_OUT);
    x += row * stride, sums += row * PANEL_OUT;
    switch (rows - row) {
        case 1: accumulate<1>(weights, k, count, x, stride, scales, sums); break;
        case 2: accumulate<2>(weights, k, count, x, stride, scales, sums); break;
#if WKV_BYTES == 64
        case 3: accumulate<3>(weights, k, count, x, stride, scales, sums); break;
        case 4: accumulate<4>(weights, k, count, x, stride, scales, sums); break;
        case 5: accumulate<5>(weights, k, count, x, stride, scales, sums); break;
#endif
    }
}

// Sums over a panel's `all` weights an output, of as many x a row; `scales` are of blocks of 64 inputs each, or null.
template <class Reader>
WKV_INLINE void sum_panel(const Reader& weights, int all, const void* from, int first_row, int rows, const float* scales,
                          float* sums) {
    typedef typename Reader::X X;
    const X* x = static_cast<const X*>(from) + static_cast<long>(first_row) * all;
    alignas(64) X spread[BLOCK * PANEL_OUT];
    for (int k = 0; k < all; k += Reader::CHUNK) {
        const int count = all - k < Reader::CHUNK ? all - k : Reader::CHUNK;
        if (Reader::CHUNK == DIRECT || rows <= ROWS) {
            accumulate_rows(weights, k, count, x + k, all, rows, scales, sums);
        } else {
            for (int i = 0; i < count; i += Reader::STEPS)
                for (int j = 0; j < PANEL_OUT; j += LANES) {
                    const auto raw = weights.load(k + i, j);
                    for (int step = 0; step < Reader::STEPS; step++) {
                        const auto weight = weights.weight(raw, step);
                        __builtin_memcpy(spread + (i + step) * PANEL_OUT + j, &weight, WKV_BYTES);
                    }
                }
            accumulate_rows(read_again(spread), 0, count, x + k, all, rows, scales, sums);
        }
        if (scales) scales += PANEL_OUT;
    }
}

void product(const Product& p, int panel, int first_row, int last_row) {
    alignas(64) float sums[ROWS_AT_ONCE * PANEL_OUT];
    const int rows = last_row - first_row, even = (p.in + 1) / 2 * 2;
    __builtin_memset(sums, 0, sizeof(float) * rows * PANEL_OUT);
    const long before = static_cast<long>(panel) * PANEL_OUT * (p.kind == PANEL_FLOAT32 ? p.in : even);
    const bool nf4 = p.kind % IN_BFLOAT16 == PANEL_NF4, int8 = p.kind % IN_BFLOAT16 == PANEL_INT8;
    const auto* codes = static_cast<const signed char*>(p.panels) + before;
    const auto* words = static_cast<const unsigned*>(p.panels) + before / (nf4 ? 8 : 2);
    const float* scales = p.scales + (nf4 ? before / BLOCK : panel * PANEL_OUT);
    const auto sum = [&](auto weights, int all, const float* block_scales) {
        sum_panel(weights, all, p.x, first_row, rows, block_scales, sums);
    };
    switch (p.kind) {
        case PANEL_FLOAT32: sum(Float32{static_cast<const float*>(p.panels) + before}, p.in, nullptr); break;
        case PANEL_FLOAT16: sum(Half<false>{words}, p.in, nullptr); break;
        case PANEL_INT8: sum(Int8{codes}, p.in, nullptr); break;
        case PANEL_NF4: sum(NF4{words}, p.in, scales); break;
#ifdef WKV_BF16
        case IN_BFLOAT16 + PANEL_BFLOAT16: sum(Pairs{words}, even / 2, nullptr); break;
        case IN_BFLOAT16 + PANEL_INT8: sum(Int8Pairs{codes}, even / 2, nullptr); break;
        case IN_BFLOAT16 + PANEL_NF4: sum(NF4Pairs{words}, even / 2, scales); break;
#else
        case IN_BFLOAT16 + PANEL_BFLOAT16: sum(Half<true>{words}, p.in, nullptr); break;
        case IN_BFLOAT16 + PANEL_INT8: sum(Int8{codes}, p.in, nullptr); break;
        case IN_BFLOAT16 + PANEL_NF4: sum(NF4{words}, p.in, scales); break;
#endif
    }
    const int first = panel * PANEL_OUT, width = p.out - first < PANEL_OUT ? p.out - first : PANEL_OUT;
    for (int row = 0; row < rows; row++) {
        const long at = static_cast<long>(first_row + row) * p.out + first;
        float* sum = sums + row * PANEL_OUT;
        for (int j = 0; j < PANEL_OUT; j += LANES) {
            vec* to = (vec*)(sum + j);
            if (int8) *to *= *(const loose*)(scales + j);
            *to = activate(*to, p.activation);
        }
        if (!p.add)
            for (int j = 0; j < width; j++) p.y[at + j] = sum[j];
        else if (!p.gate)
            for (int j = 0; j < width; j++) p.y[at + j] += sum[j];
        else
            for (int j = 0; j < width; j++) p.y[at + j] += p.gate[at + j] * sum[j];
    }
}

void round_row(const float* x, void* to, int in) {
#ifdef WKV_BF16
    auto* halves = static_cast<bf16*>(to);
    for (int k = 0; k < in; k++) write(halves + k, x[k]);
    if (in % 2) halves[in].bits = 0;
#else
    for (int k = 0; k < in; k++) {
        bf16 half;
        write(&half, x[k]);
        static_cast<float*>(to)[k] = read(&half);
    }
#endif
}

}  // namespace WKV_ISA
}  // namespace wkv
