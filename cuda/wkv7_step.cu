// RWKV-7 decodes on a GPU: one token of each sequence (step.cuh), S[value][key],
//     S <- S diag(w) + (S z) b^T + v k^T,   y = S r,   z = -kappa, b = kappa * a
// A lane holds four keys of each row, a group of lanes a row: what the token brings for keys stays in registers, and the two sums
// over keys are shuffles within the group.
#include "step.cuh"

namespace wkv {
namespace {

template <int WIDTH>
struct Rows {
    static constexpr int LANES = WIDTH / 4, GROUPS = 32 / LANES;
    static constexpr int OF_GROUP = WIDTH / GROUPS < STEP_ROWS ? WIDTH / GROUPS : STEP_ROWS, PARTS = WIDTH / (GROUPS * OF_GROUP);
};

template <class E, int WIDTH, bool WHOLE>
__global__ void __launch_bounds__(STEP_THREADS) step(Shape shape, Forward7 x) {
    constexpr int LANES = Rows<WIDTH>::LANES, GROUPS = Rows<WIDTH>::GROUPS, ROWS = Rows<WIDTH>::OF_GROUP;
    const StepShare own(shape, Rows<WIDTH>::PARTS);
    if (own.none) return;
    const int n = WHOLE ? WIDTH : shape.head_size, lane = threadIdx.x % LANES, key = 4 * lane;
    const int row = (own.part * GROUPS + threadIdx.x % 32 / LANES) * ROWS;
    const long at = static_cast<long>(own.head) * n, states = at * n;
    auto keys_of = [&](int i) { return row + i < n ? n : 0; };  // none in rows that are not there
    float s[ROWS][4];
    WKV_UNROLL
    for (int i = 0; i < ROWS; i++)
        take<WHOLE>(static_cast<const float*>(x.state) + states + (row + i) * n, key, keys_of(i), s[i]);
    float r[4], w[4], k[4], kappa[4], a[4], v[ROWS];
    take<WHOLE>(static_cast<const E*>(x.r) + at, key, n, r);
    take<WHOLE>(static_cast<const float*>(x.log_w) + at, key, n, w);
    take<WHOLE>(static_cast<const E*>(x.k) + at, key, n, k);
    take<WHOLE>(static_cast<const E*>(x.kappa) + at, key, n, kappa);
    take<WHOLE>(static_cast<const E*>(x.a) + at, key, n, a);
    take<WHOLE>(static_cast<const E*>(x.v) + at, row, n, v);
    WKV_UNROLL
    for (int j = 0; j < 4; j++) w[j] = expf(w[j]);

    float s_z[ROWS], y[ROWS];
    WKV_UNROLL
    for (int i = 0; i < ROWS; i++)
        s_z[i] = -(s[i][0] * kappa[0] + s[i][1] * kappa[1] + (s[i][2] * kappa[2] + s[i][3] * kappa[3]));
    sum_over_lanes<1, LANES>(s_z);
    WKV_UNROLL
    for (int i = 0; i < ROWS; i++) {
        WKV_UNROLL
        for (int j = 0; j < 4; j++) s[i][j] = s[i][j] * w[j] + (s_z[i] * (kappa[j] * a[j]) + v[i] * k[j]);
        y[i] = s[i][0] * r[0] + s[i][1] * r[1] + (s[i][2] * r[2] + s[i][3] * r[3]);
        give<WHOLE>(static_cast<float*>(x.final_state) + states + (row + i) * n, key, keys_of(i), s[i]);
    }
    sum_over_lanes<1, LANES>(y);
    if (lane == 0) give<WHOLE>(static_cast<E*>(x.y) + at, row, n, y);
}

}  // namespace

int wkv7_step_forward(const Shape& shape, const Forward7& x, Stream stream) {
    const auto tensors = {x.r, x.log_w, x.k, x.v, x.kappa, x.a, x.state, static_cast<const void*>(x.y),
                          static_cast<const void*>(x.final_state)};
    return by_step_form(shape, tensors, [&](auto width, auto element, auto whole) {
        return launch_step(step<decltype(element), width(), whole()>, shape, Rows<width()>::PARTS, x, stream);
    });
}

}  // namespace wkv
