// The CPU's kernels for AVX-512; only called where the processor has it.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define WKV_ISA avx512
#define WKV_BYTES 64
#define WKV_TABLE AVX512_KERNELS
#define DECODE_TABLE AVX512_DECODE
#include "cpu_kernels.inl"
#include "decode_kernels.inl"
