// The CUDA kernels' entry points, run on the CPU (tests/kernels/host_shim.h) and called from Python by plain pointers.
#include "cuda_kernels.h"
#include "tile.cuh"

using namespace wkv;

extern "C" size_t scratch_bytes(int version, bool chunked, bool backward, const Shape* shape, int blocks) {
    if (!chunked) return !backward ? 0 : version == 6 ? wkv6_sequential_scratch(*shape) : wkv7_sequential_scratch(*shape);
    if (version == 6) return backward ? wkv6_chunked_backward_scratch(*shape, blocks) : wkv6_chunked_forward_scratch(*shape, blocks);
    return backward ? wkv7_chunked_backward_scratch(*shape, blocks) : wkv7_chunked_forward_scratch(*shape, blocks);
}

extern "C" int run(int version, bool chunked, bool backward, const Shape* shape, const void* x, int blocks, void* scratch) {
    if (version == 6 && !backward) {
        const Forward6& arguments = *static_cast<const Forward6*>(x);
        return chunked ? wkv6_chunked_forward(*shape, arguments, blocks, scratch, nullptr)
                       : wkv6_sequential_forward(*shape, arguments, nullptr);
    }
    if (version == 6) {
        const Backward6& arguments = *static_cast<const Backward6*>(x);
        return chunked ? wkv6_chunked_backward(*shape, arguments, blocks, scratch, nullptr)
                       : wkv6_sequential_backward(*shape, arguments, scratch, nullptr);
    }
    if (!backward) {
        const Forward7& arguments = *static_cast<const Forward7*>(x);
        return chunked ? wkv7_chunked_forward(*shape, arguments, blocks, scratch, nullptr)
                       : wkv7_sequential_forward(*shape, arguments, nullptr);
    }
    const Backward7& arguments = *static_cast<const Backward7*>(x);
    return chunked ? wkv7_chunked_backward(*shape, arguments, blocks, scratch, nullptr)
                   : wkv7_sequential_backward(*shape, arguments, scratch, nullptr);
}

extern "C" int run_step(int version, const Shape* shape, const void* x) {
    return version == 6 ? wkv6_step_forward(*shape, *static_cast<const Forward6*>(x), nullptr)
                        : wkv7_step_forward(*shape, *static_cast<const Forward7*>(x), nullptr);
}

extern "C" int run_sample(const Sample* x) { return sample(*x, nullptr); }

extern "C" void run_round_tf32(unsigned* bits, int n) {
    for (int i = 0; i < n; i++) bits[i] = __float_as_uint(round_tf32(__uint_as_float(bits[i])));
}

extern "C" int run_int8_product(const Int8Weight* w, const void* x, int rows, void* y) { return int8_product(*w, x, rows, y, nullptr); }

extern "C" int run_int8_dequantize(const Int8Weight* w, void* weight) { return int8_dequantize(*w, weight, nullptr); }
