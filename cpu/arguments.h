// What every WKV kernel is called with: plain pointers and numbers, no torch, the same on CPU and GPU.
//
// Tokens are packed: x[T_total][H][N], sequence s owns tokens bounds[s] to bounds[s + 1]. States are [S][H][N][N],
// rows are keys in v6 (S[key][value]) and values in v7 (S[value][key]), as in src/wkv/reference.py. A checkpoint is the
// state before every interval-th token of a sequence: checkpoints[checkpoint_bounds[s] + i][H][N][N] is the state before
// token i * interval of sequence s, with ceil(length / interval) of them. Where `checkpoints` is null none are written.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define WKV_ANYWHERE __host__ __device__
#else
#define WKV_ANYWHERE
#endif

namespace wkv {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

struct Shape {
    int n_sequences, n_head, head_size;
    int total;                     // T_total
    int interval;                  // tokens between two checkpoints
    int dtype;                     // of everything typed void below; accumulation and states are float (double for FLOAT64)
    const int* bounds;             // [S + 1], where the kernel runs
    const int* host_bounds;        // [S + 1], the same on the host, for choosing grids
};

// Where a sequence's checkpoints begin, and room enough for all: known from sizes alone, some rows may stay unused.
WKV_ANYWHERE inline int first_checkpoint(const int* bounds, int interval, int sequence) { return bounds[sequence] / interval + sequence; }
WKV_ANYWHERE inline int most_checkpoints(int total, int n_sequences, int interval) { return total / interval + n_sequences; }

// v6: y_t = r_t^T (S + (u * k_t) v_t^T), S <- diag(w_t) S + k_t v_t^T.  log_w, u and states: float (double for FLOAT64).
struct Forward6 {
    const void *r, *log_w, *k, *v, *u, *state;
    void *y, *final_state, *checkpoints;
};

struct Backward6 {
    const void *r, *log_w, *k, *v, *u, *checkpoints;
    const void *d_y, *d_final_state;
    void *d_r, *d_log_w, *d_k, *d_v, *d_u /* [S][H][N], to be summed over S */, *d_state;
};

// v7: S <- S diag(w_t) - (S kappa_t)(kappa_t * a_t)^T + v_t k_t^T, y_t = S r_t.  log_w and states: float (double for FLOAT64).
struct Forward7 {
    const void *r, *log_w, *k, *v, *kappa, *a, *state;
    void *y, *final_state, *checkpoints;
};

struct Backward7 {
    const void *r, *log_w, *k, *v, *kappa, *a, *checkpoints;
    const void *d_y, *d_final_state;
    void *d_r, *d_log_w, *d_k, *d_v, *d_kappa, *d_a, *d_state;
};

}  // namespace wkv
