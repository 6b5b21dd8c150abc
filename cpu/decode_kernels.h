// What the CPU needs beside the recurrence to write text: products with weights laid in panels, and what lies between them.
// All activations are float32. Every number is computed in an order that depends on its own row alone, so that a row comes out
// the same to the last bit whatever rows are computed beside it.
//
// Panels: W [out, in] is cut into panels of 64 outputs (the last filled up with zeros), inputs outermost, so that a product
// reads its weights once and in order:
//   PANEL_FLOAT32   float[panel][in][64]
//   PANEL_BFLOAT16  bf16[panel][in / 2][64][2]             two inputs side by side; `in` is filled up to even
//   PANEL_FLOAT16   as bfloat16, IEEE halves
//   PANEL_INT8      int8[panel][in][64], scales float[panel][64]; `in` is filled up to even
//   PANEL_NF4       bf16[panel][in / 8][64][2], but in place of one bf16 the codes of four inputs, each four bits: of inputs
//                   0, 2, 4, 6, lowest bits first, and of inputs 1, 3, 5, 7; scales float[panel][in / 64][64]
// Codes are multiplied and summed as they are, NF4's 16 values rounded to bfloat16 where two are multiplied at once; scales
// multiply the sums.
#pragma once

#include "arguments.h"

namespace wkv {

enum Panel { PANEL_FLOAT32 = 0, PANEL_BFLOAT16 = 1, PANEL_FLOAT16 = 2, PANEL_INT8 = 3, PANEL_NF4 = 4 };
constexpr int IN_BFLOAT16 = 16;
enum Activation { IDENTITY = 0, TANH = 1, SIGMOID = 2, RELU_SQUARE = 3 };

constexpr int PANEL_OUT = 64;  // outputs a panel
constexpr int ROWS_AT_ONCE = 96;  // rows of x that share a pass over a panel

// y [rows, out] = activation(x W^T), or y += gate * that where told to add.
struct Product {
    const void* x;        // float [rows, in], or what `round_row` made of it for products in bfloat16
    const void* panels;
    const float* scales;  // of int8 and nf4
    float* y;
    const float* gate;    // [rows, out] or null: 1
    int rows, in, out;
    int kind;             // a Panel, and IN_BFLOAT16 more where x is rounded to bfloat16
    int activation;
    bool add;
};

// Layer norm of x [T, D] into `normed`, then normed + (previous - normed) * mix into out [n_mixes][T][D], for one sequence.
struct NormMix {
    const float *x, *weight, *bias;
    float *normed, *delta, *shift, *out;  // delta: previous - normed; shift [S, D]: the token before each sequence's first, then its last
    const float *mixes;           // [n_mixes, D]
    const int* bounds;
    float eps;
    int total, width, n_mixes;
};

// The mixes of v6, by token: normed + delta * (mixes[i] + moved[i]), i < 5, in `moved`'s place.
struct TokenMix {
    const float *normed, *delta, *mixes;  // [T, D], [T, D], [5, D]
    float* moved[5];                      // [T, D] each
    int width;
};

// What v7 does around its recurrence, in place, for one head of one sequence. All [T, D] but the vectors [D].
struct Around7 {
    float *r, *k, *v, *w, *a, *kappa, *y;                // w, a: low-rank outputs, then log decay and rate; y: then the output
    const float *v_first, *v_gate, *g;                   // v_first null in block 0
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *norm_weight, *norm_bias;
    float eps;
    const int* bounds;
    int n_head, head_size;
};

// The same for v6. w: low-rank output, then log decay; g: before its SiLU.
struct Around6 {
    float *w, *y;
    const float *g, *time_decay, *norm_weight, *norm_bias;
    float eps;
    const int* bounds;
    int n_head, head_size;
};

struct DecodeKernels {
    void (*product)(const Product& x, int panel, int first_row, int last_row);
    void (*round_row)(const float* x, void* to, int in);  // one row for a product in bfloat16, at most 4 bytes an input
    void (*norm_mix)(const NormMix& x, int sequence);
    void (*token_mix)(const TokenMix& x, int token);
    void (*before7)(const Around7& x, int sequence, int head);
    void (*after7)(const Around7& x, int sequence, int head);
    void (*before6)(const Around6& x, int sequence, int head);
    void (*after6)(const Around6& x, int sequence, int head);
    // Logits [n] become e^(logit - largest), and 0 where a token may not be drawn (sample.h); returns their sum, NaN where a logit
    // is not finite or none may be drawn.
    double (*softmax_terms)(float* x, const short* next, bool last, int n_blank, long n);
};

extern const DecodeKernels AVX512BF16_DECODE, AVX512_DECODE, AVX2_DECODE, PLAIN_DECODE;

}  // namespace wkv
