// RWKV-6 decodes on a GPU: one token of each sequence (step.cuh), S[key][value],
//     y = r^T (S + (u * k) v^T),   S <- diag(w) S + k v^T
// A lane holds four values of each row and walks down the keys, STEP_ROWS at a time; groups of lanes walk side by side, and their
// sums over keys meet by shuffles at the end. With r^T (u * k) as one more sum, y needs no product by u for each value.
#include "step.cuh"

namespace wkv {
namespace {

template <int WIDTH>
struct Columns {
    // Of a warp: 128 bytes of a row where the head is that wide.
    static constexpr int OF_WARP = WIDTH < 32 ? WIDTH : 32, LANES = OF_WARP / 4, PARTS = WIDTH / OF_WARP;
};

template <class E, int WIDTH, bool WHOLE>
__global__ void __launch_bounds__(STEP_THREADS) step(Shape shape, Forward6 x) {
    constexpr int LANES = Columns<WIDTH>::LANES, GROUPS = 32 / LANES;
    const StepShare own(shape, Columns<WIDTH>::PARTS);
    if (own.none) return;
    const int n = WHOLE ? WIDTH : shape.head_size, group = threadIdx.x % 32 / LANES;
    const int value = own.part * Columns<WIDTH>::OF_WARP + threadIdx.x % LANES * 4;
    const long at = static_cast<long>(own.head) * n, states = at * n;
    const float* bonus = static_cast<const float*>(x.u) + own.head % shape.n_head * n;
    float v[4], sums[5] = {};  // r S for each value, and r u k
    take<WHOLE>(static_cast<const E*>(x.v) + at, value, n, v);
    for (int row = group * STEP_ROWS; row < WIDTH; row += GROUPS * STEP_ROWS) {
        auto values_of = [&](int i) { return row + i < n ? n : 0; };  // none in rows that are not there
        float s[STEP_ROWS][4], r[STEP_ROWS], w[STEP_ROWS], k[STEP_ROWS], u[STEP_ROWS];
        WKV_UNROLL
        for (int i = 0; i < STEP_ROWS; i++)
            take<WHOLE>(static_cast<const float*>(x.state) + states + (row + i) * n, value, values_of(i), s[i]);
        take<WHOLE>(static_cast<const E*>(x.r) + at, row, n, r);
        take<WHOLE>(static_cast<const float*>(x.log_w) + at, row, n, w);
        take<WHOLE>(static_cast<const E*>(x.k) + at, row, n, k);
        take<WHOLE>(bonus, row, n, u);
        WKV_UNROLL
        for (int i = 0; i < STEP_ROWS; i++) {
            const float decay = expf(w[i]);
            sums[4] += r[i] * u[i] * k[i];
            WKV_UNROLL
            for (int j = 0; j < 4; j++) {
                sums[j] += r[i] * s[i][j];
                s[i][j] = s[i][j] * decay + k[i] * v[j];
            }
            give<WHOLE>(static_cast<float*>(x.final_state) + states + (row + i) * n, value, values_of(i), s[i]);
        }
    }
    sum_over_lanes<LANES, 32>(sums);
    if (group != 0) return;
    float y[4];
    WKV_UNROLL
    for (int j = 0; j < 4; j++) y[j] = sums[j] + sums[4] * v[j];
    give<WHOLE>(static_cast<E*>(x.y) + at, value, n, y);
}

}  // namespace

int wkv6_step_forward(const Shape& shape, const Forward6& x, Stream stream) {
    const auto tensors = {x.r, x.log_w, x.k, x.v, x.u, x.state, static_cast<const void*>(x.y),
                          static_cast<const void*>(x.final_state)};
    return by_step_form(shape, tensors, [&](auto width, auto element, auto whole) {
        return launch_step(step<decltype(element), width(), whole()>, shape, Columns<width()>::PARTS, x, stream);
    });
}

}  // namespace wkv
