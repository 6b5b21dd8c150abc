// Products with a weight held as int8 codes [out][in] and a float32 scale for each output row (src/quantization/int8.py).
#pragma once

namespace wkv {

struct Int8Weight {
    const signed char* codes;  // [out][in]
    const float* scales;       // [out]
    int out, in;
    int dtype;                 // Dtype of activations and of the written weight: FLOAT32, BFLOAT16, or FLOAT16 below
};

constexpr int FLOAT16 = 3;      // beside Dtype of arguments.h
constexpr int INT8_PIECE = 16;  // codes in one load; `in` is a multiple of it and pointers are aligned to 16 bytes in int8_product

}  // namespace wkv
