// The CPU's kernels for AVX2; only called where the processor has it.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#endif
#define WKV_ISA avx2
#define WKV_BYTES 32
#define WKV_TABLE AVX2_KERNELS
#define DECODE_TABLE AVX2_DECODE
#include "cpu_kernels.inl"
#include "decode_kernels.inl"
