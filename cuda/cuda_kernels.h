// The CUDA kernels' entry points. All return a cudaError_t as int (0: fine), only enqueue on `stream`, and never synchronize.
//
// `scratch` is device memory of at least the bytes that the function's `_scratch` twin names (may be null where that is 0);
// its contents before do not matter. Chunked entry points serve only what `chunked_serves` says; sequential ones and steps serve
// heads of up to LARGEST_HEAD. A step is one token of each sequence, decoding: it looks at no bounds, writes no checkpoints, and may
// write final_state over state.
#pragma once

#include <cstddef>

#include "../cpu/arguments.h"
#include "int8_product.h"
#include "../cpu/sample.h"

namespace wkv {

#ifdef WKV_ON_HOST
typedef void* Stream;
#else
typedef struct CUstream_st* Stream;
#endif

int wkv6_sequential_forward(const Shape& shape, const Forward6& x, Stream stream);
size_t wkv6_sequential_scratch(const Shape& shape);  // of the backward; the forward takes none
int wkv6_sequential_backward(const Shape& shape, const Backward6& x, void* scratch, Stream stream);
int wkv6_step_forward(const Shape& shape, const Forward6& x, Stream stream);

int wkv7_sequential_forward(const Shape& shape, const Forward7& x, Stream stream);
size_t wkv7_sequential_scratch(const Shape& shape);
int wkv7_sequential_backward(const Shape& shape, const Backward7& x, void* scratch, Stream stream);
int wkv7_step_forward(const Shape& shape, const Forward7& x, Stream stream);

// `blocks` is how many blocks the device runs at once: fewer sequences times heads than that are cut into segments.
size_t wkv6_chunked_forward_scratch(const Shape& shape, int blocks);
int wkv6_chunked_forward(const Shape& shape, const Forward6& x, int blocks, void* scratch, Stream stream);
size_t wkv6_chunked_backward_scratch(const Shape& shape, int blocks);
int wkv6_chunked_backward(const Shape& shape, const Backward6& x, int blocks, void* scratch, Stream stream);

size_t wkv7_chunked_forward_scratch(const Shape& shape, int blocks);
int wkv7_chunked_forward(const Shape& shape, const Forward7& x, int blocks, void* scratch, Stream stream);
size_t wkv7_chunked_backward_scratch(const Shape& shape, int blocks);
int wkv7_chunked_backward(const Shape& shape, const Backward7& x, int blocks, void* scratch, Stream stream);

int sample(const Sample& x, Stream stream);

constexpr int CUDA_INTERVAL = 16;  // of both forms; the chunked one's chunk
constexpr int LARGEST_HEAD = 128;

// The states of one interval for each head of each sequence.
inline size_t interval_scratch(const Shape& shape) {
    const size_t width = shape.head_size <= 16 ? 16 : shape.head_size <= 32 ? 32 : shape.head_size <= 64 ? 64 : 128;
    return sizeof(float) * shape.n_sequences * shape.n_head * CUDA_INTERVAL * width * width;
}

inline bool chunked_serves(const Shape& shape) { return shape.head_size == 32 || shape.head_size == 64; }

// x [rows][in], y [rows][out]; `in` is a multiple of INT8_PIECE, pointers are aligned to 16 bytes, rows * in < 2^31, nothing is empty.
int int8_product(const Int8Weight& w, const void* x, int rows, void* y, Stream stream);
// weight [out][in], of any alignment.
int int8_dequantize(const Int8Weight& w, void* weight, Stream stream);

}  // namespace wkv
