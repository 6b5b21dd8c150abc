// From torch tensors to the kernels' plain arguments, the same for CPU and CUDA: shapes, dtypes, outputs.
#pragma once

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "arguments.h"

namespace wkv {

using at::Tensor;

// Checks what the kernels take for granted and describes it. `cu_seqlens` is on the CPU; so are the Shape's host bounds.
inline Shape describe(const Tensor& r, const std::vector<Tensor>& like_r, const Tensor& log_w, const Tensor& state,
                      const Tensor& cu_seqlens, int64_t interval) {
    TORCH_CHECK(r.dim() == 3, "wkv: tokens are [T_total, H, N], not ", r.sizes());
    TORCH_CHECK(cu_seqlens.device().is_cpu() && cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1
                    && cu_seqlens.numel() > 0 && cu_seqlens.is_contiguous(), "wkv: cu_seqlens is int32 [S + 1] on the CPU");
    const int* bounds = cu_seqlens.const_data_ptr<int>();
    const int64_t n_sequences = cu_seqlens.numel() - 1;
    for (int64_t s = 0; s < n_sequences; s++) TORCH_CHECK(bounds[s] <= bounds[s + 1], "wkv: cu_seqlens must not fall");
    TORCH_CHECK(bounds[0] == 0 && bounds[n_sequences] == r.size(0), "wkv: cu_seqlens runs from 0 to T_total = ", r.size(0));
    TORCH_CHECK(interval > 0, "wkv: interval is a number of tokens");
    const at::ScalarType computed = r.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    auto fits = [&](const Tensor& x, at::IntArrayRef sizes, at::ScalarType type) {
        return x.sizes() == sizes && x.scalar_type() == type && x.device() == r.device() && x.is_contiguous();
    };
    for (const Tensor& x : like_r)
        TORCH_CHECK(fits(x, r.sizes(), r.scalar_type()), "wkv: tokens are all ", r.scalar_type(), " ", r.sizes(), " on ", r.device());
    TORCH_CHECK(fits(log_w, r.sizes(), computed), "wkv: log_w is ", computed, " ", r.sizes());
    TORCH_CHECK(fits(state, {n_sequences, r.size(1), r.size(2), r.size(2)}, computed), "wkv: a state is ", computed, " [S, H, N, N]");
    const int dtype = r.scalar_type() == at::kFloat ? FLOAT32 : r.scalar_type() == at::kBFloat16 ? BFLOAT16 : FLOAT64;
    TORCH_CHECK(dtype != FLOAT64 || r.scalar_type() == at::kDouble, "wkv: float32, bfloat16 or float64, not ", r.scalar_type());
    Shape shape{};
    shape.n_sequences = static_cast<int>(n_sequences), shape.n_head = static_cast<int>(r.size(1));
    shape.head_size = static_cast<int>(r.size(2)), shape.total = static_cast<int>(r.size(0));
    shape.interval = static_cast<int>(interval), shape.dtype = dtype;
    shape.bounds = shape.host_bounds = bounds;
    return shape;
}

inline void check_bonus(const Shape& shape, const Tensor& u, const Tensor& state) {
    TORCH_CHECK(u.sizes() == at::IntArrayRef({shape.n_head, shape.head_size}) && u.scalar_type() == state.scalar_type()
                    && u.device() == state.device() && u.is_contiguous(), "wkv: u is ", state.scalar_type(), " [H, N]");
}

inline void check_checkpoints(const Shape& shape, const Tensor& checkpoints, const Tensor& state) {
    TORCH_CHECK(checkpoints.dim() == 4 && checkpoints.size(0) == most_checkpoints(shape.total, shape.n_sequences, shape.interval)
                    && checkpoints.sizes().slice(1) == state.sizes().slice(1) && checkpoints.scalar_type() == state.scalar_type()
                    && checkpoints.device() == state.device() && checkpoints.is_contiguous(), "wkv: checkpoints are the forward's");
}

inline Tensor new_checkpoints(const Shape& shape, const Tensor& state, bool wanted) {
    const int64_t rows = wanted ? most_checkpoints(shape.total, shape.n_sequences, shape.interval) : 0;
    return at::empty({rows, shape.n_head, shape.head_size, shape.head_size}, state.options());
}

// Run(shape, arguments) launches on the device that it belongs to.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> forward6(Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v,
                                            const Tensor& u, const Tensor& state, const Tensor& cu_seqlens, int64_t interval,
                                            bool checkpoints) {
    const Shape shape = describe(r, {r, k, v}, log_w, state, cu_seqlens, interval);
    check_bonus(shape, u, state);
    Tensor y = at::empty_like(r), final_state = at::empty_like(state), saved = new_checkpoints(shape, state, checkpoints);
    run(shape, Forward6{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), u.const_data_ptr(),
                        state.const_data_ptr(), y.data_ptr(), final_state.data_ptr(), checkpoints ? saved.data_ptr() : nullptr});
    return {y, final_state, saved};
}

// One token of each sequence; the state moves on in place. Run as in `forward6`.
template <class Run>
Tensor step6(Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& state,
             int64_t interval) {
    const Tensor bounds = at::arange(r.size(0) + 1, at::kInt);
    const Shape shape = describe(r, {r, k, v}, log_w, state, bounds, interval);
    check_bonus(shape, u, state);
    Tensor y = at::empty_like(r);
    run(shape, Forward6{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), u.const_data_ptr(),
                        state.const_data_ptr(), y.data_ptr(), state.data_ptr(), nullptr});
    return y;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward6(
    Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& u, const Tensor& checkpoints,
    const Tensor& cu_seqlens, const Tensor& d_y, const Tensor& d_final_state, int64_t interval) {
    const Shape shape = describe(r, {r, k, v, d_y}, log_w, d_final_state, cu_seqlens, interval);
    check_bonus(shape, u, d_final_state);
    check_checkpoints(shape, checkpoints, d_final_state);
    Tensor d_r = at::empty_like(r), d_log_w = at::empty_like(log_w), d_k = at::empty_like(k), d_v = at::empty_like(v);
    Tensor d_u = at::empty({shape.n_sequences, shape.n_head, shape.head_size}, u.options()), d_state = at::empty_like(d_final_state);
    run(shape, Backward6{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), u.const_data_ptr(),
                         checkpoints.const_data_ptr(), d_y.const_data_ptr(), d_final_state.const_data_ptr(), d_r.data_ptr(),
                         d_log_w.data_ptr(), d_k.data_ptr(), d_v.data_ptr(), d_u.data_ptr(), d_state.data_ptr()});
    return {d_r, d_log_w, d_k, d_v, d_u.sum(0), d_state};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> forward7(Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v,
                                            const Tensor& kappa, const Tensor& a, const Tensor& state, const Tensor& cu_seqlens,
                                            int64_t interval, bool checkpoints) {
    const Shape shape = describe(r, {r, k, v, kappa, a}, log_w, state, cu_seqlens, interval);
    Tensor y = at::empty_like(r), final_state = at::empty_like(state), saved = new_checkpoints(shape, state, checkpoints);
    run(shape, Forward7{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), kappa.const_data_ptr(),
                        a.const_data_ptr(), state.const_data_ptr(), y.data_ptr(), final_state.data_ptr(),
                        checkpoints ? saved.data_ptr() : nullptr});
    return {y, final_state, saved};
}

template <class Run>
Tensor step7(Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
             const Tensor& state, int64_t interval) {
    const Tensor bounds = at::arange(r.size(0) + 1, at::kInt);
    const Shape shape = describe(r, {r, k, v, kappa, a}, log_w, state, bounds, interval);
    Tensor y = at::empty_like(r);
    run(shape, Forward7{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), kappa.const_data_ptr(),
                        a.const_data_ptr(), state.const_data_ptr(), y.data_ptr(), state.data_ptr(), nullptr});
    return y;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward7(
    Run run, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& kappa, const Tensor& a,
    const Tensor& checkpoints, const Tensor& cu_seqlens, const Tensor& d_y, const Tensor& d_final_state, int64_t interval) {
    const Shape shape = describe(r, {r, k, v, kappa, a, d_y}, log_w, d_final_state, cu_seqlens, interval);
    check_checkpoints(shape, checkpoints, d_final_state);
    Tensor d_r = at::empty_like(r), d_log_w = at::empty_like(log_w), d_k = at::empty_like(k), d_v = at::empty_like(v);
    Tensor d_kappa = at::empty_like(kappa), d_a = at::empty_like(a), d_state = at::empty_like(d_final_state);
    run(shape, Backward7{r.const_data_ptr(), log_w.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), kappa.const_data_ptr(),
                         a.const_data_ptr(), checkpoints.const_data_ptr(), d_y.const_data_ptr(), d_final_state.const_data_ptr(),
                         d_r.data_ptr(), d_log_w.data_ptr(), d_k.data_ptr(), d_v.data_ptr(), d_kappa.data_ptr(), d_a.data_ptr(),
                         d_state.data_ptr()});
    return {d_r, d_log_w, d_k, d_v, d_kappa, d_a, d_state};
}

}  // namespace wkv
