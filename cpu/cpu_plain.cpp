// The CPU's kernels for any processor, as the compiler's own default has it.

#define WKV_ISA plain
#define WKV_BYTES 16
#define WKV_TABLE PLAIN_KERNELS
#define DECODE_TABLE PLAIN_DECODE
#include "cpu_kernels.inl"
#include "decode_kernels.inl"
