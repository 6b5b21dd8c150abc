// What decode_kernels.h lists for AVX-512 with products of bfloat16 pairs; only called where the processor has them.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define WKV_BF16
#endif
#define WKV_ISA avx512bf16
#define WKV_BYTES 64
#define DECODE_TABLE AVX512BF16_DECODE
#include "decode_kernels.inl"
