// float16 in and out, beside bfloat16 in device.cuh.
#pragma once

#include "device.cuh"

#ifndef WKV_ON_HOST
#include <cuda_fp16.h>
#endif

namespace wkv {

struct fp16 {
    unsigned short bits;
};

#ifdef WKV_ON_HOST

inline float to_float(fp16 x) {
    const unsigned exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                       : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(mantissa | 1024), static_cast<int>(exponent) - 25);
    return x.bits >> 15 ? -size : size;
}

// To nearest, ties to even.
inline void store(fp16* at, float x) {
    const float size = std::fabs(x);
    unsigned bits = __float_as_uint(size);
    if (!(size < 65520.0f))
        bits = x == x ? 0x7c00u : 0x7e00u;
    else if (size < 6.103515625e-5f)
        bits = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 24)));
    else
        bits = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    at->bits = static_cast<unsigned short>(bits | (std::signbit(x) ? 0x8000u : 0u));
}

#else

__device__ __forceinline__ float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void store(fp16* at, float x) { at->bits = __half_as_ushort(__float2half_rn(x)); }

#endif

}  // namespace wkv
