// Instantiates the CPU's kernels for one instruction set; cpu_avx512.cpp and its siblings define WKV_ISA, WKV_BYTES and WKV_TABLE.
#include "cpu_kernels.h"
#include "wkv6_cpu.h"
#include "wkv7_cpu.h"

namespace wkv {
namespace WKV_ISA {

static_assert(CPU_INTERVAL == CPU_INTERVAL_TOKENS, "callers lay out checkpoints by the latter");

// Calls f<element, computed in, padded head> as shape asks.
#define WKV_BY_WIDTH(f, E, C)                                        \
    do {                                                             \
        if (shape.head_size <= 16) f<E, C, 16>(shape, x, s, h);      \
        else if (shape.head_size <= 32) f<E, C, 32>(shape, x, s, h); \
        else if (shape.head_size <= 64) f<E, C, 64>(shape, x, s, h); \
        else f<E, C, 128>(shape, x, s, h);                           \
    } while (0)
#define WKV_ENTRY(f, X)                                                              \
    static void run_##f(const Shape& shape, const X& x, int s, int h) {              \
        if (shape.dtype == FLOAT32) WKV_BY_WIDTH(f, float, float);                   \
        else if (shape.dtype == BFLOAT16) WKV_BY_WIDTH(f, bf16, float);              \
        else WKV_BY_WIDTH(f, double, double);                                        \
    }
WKV_ENTRY(forward6, Forward6)
WKV_ENTRY(backward6, Backward6)
WKV_ENTRY(forward7, Forward7)
WKV_ENTRY(backward7, Backward7)

}  // namespace WKV_ISA

const CpuKernels WKV_TABLE = {WKV_ISA::run_forward6, WKV_ISA::run_backward6, WKV_ISA::run_forward7, WKV_ISA::run_backward7};

}  // namespace wkv
