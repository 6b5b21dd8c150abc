// torch.ops.rwkv_wkv.decode_*: the model's step on the CPU, called by src/model/decode.py. They trust their caller in shapes and
// dtypes: float32, contiguous, packed sequences with int32 borders [S + 1].
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "bindings_decode.h"
#include "cpu_kernels.h"

namespace {

using namespace wkv;

// y_i = activation_i(x_i W_i^T), all at once; with `add`, the one product is added to it in place, times `gate`.
// kinds: a Panel, and IN_BFLOAT16 more where x is to be rounded to bfloat16.
Tensors products(const Tensors& x, const Tensors& panels, const Tensors& scales, at::IntArrayRef outs, at::IntArrayRef kinds,
                 at::IntArrayRef activations, const std::optional<Tensor>& add, const std::optional<Tensor>& gate) {
    Tensors results, rounded;
    std::vector<Product> work;
    std::vector<int64_t> before{0};
    for (size_t i = 0; i < x.size(); i++) {
        const int rows = x[i].size(0), in = x[i].size(1), out = outs[i];
        const bool in_bfloat16 = kinds[i] & IN_BFLOAT16;
        TORCH_CHECK(x[i].scalar_type() == at::kFloat && x[i].is_contiguous(), "decode: x is contiguous float32");
        results.push_back(add ? *add : at::empty({rows, out}, x[i].options()));
        Product p{x[i].const_data_ptr(), panels[i].const_data_ptr(), static_cast<const float*>(scales[i].const_data_ptr()),
                  data(results.back()), data(gate), rows, in, out, static_cast<int>(kinds[i]),
                  static_cast<int>(activations[i]), add.has_value()};
        if (in_bfloat16) {
            // Two inputs take 4 bytes with AVX-512's bfloat16 and 8 without.
            const int64_t stride = &kernels() == &AVX512BF16_DECODE ? (in + 1) / 2 : in;
            rounded.push_back(at::empty({rows, stride}, x[i].options()));
            float* to = data(rounded.back());
            at::parallel_for(0, rows, 16, [&, from = static_cast<const float*>(p.x)](int64_t first, int64_t last) {
                for (int64_t row = first; row < last; row++) kernels().round_row(from + row * in, to + row * stride, in);
            });
            p.x = to;
        }
        const int64_t blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
        before.push_back(before.back() + blocks * ((out + PANEL_OUT - 1) / PANEL_OUT));
        work.push_back(p);
    }
    spread(before.back(), [&](int64_t item) {
        const auto i = std::upper_bound(before.begin(), before.end(), item) - before.begin() - 1;
        const Product& p = work[i];
        const int blocks = (p.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
        const int panel = static_cast<int>(item - before[i]) / blocks, block = static_cast<int>(item - before[i]) % blocks;
        kernels().product(p, panel, block * ROWS_AT_ONCE, std::min(p.rows, (block + 1) * ROWS_AT_ONCE));
    });
    return results;
}

// Normed x [T, D], what each token's predecessor differs from it by, and the mixes [n, T, D]; `shift` [S, D] moves on in place.
std::tuple<Tensor, Tensor, Tensor> norm_mix(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                            const Tensor& shift, const Tensor& bounds, const Tensor& mixes) {
    const int total = x.size(0), width = x.size(1), n_mixes = mixes.size(0);
    Tensor normed = at::empty_like(x), delta = at::empty_like(x), out = at::empty({n_mixes, total, width}, x.options());
    TORCH_CHECK(shift.is_contiguous() && x.is_contiguous(), "decode: x and shift are contiguous");
    const NormMix p{data(x), data(weight), data(bias), data(normed), data(delta), data(shift), data(out), data(mixes),
                    bounds.const_data_ptr<int>(), static_cast<float>(eps), total, width, n_mixes};
    spread(shift.size(0), [&](int64_t sequence) { kernels().norm_mix(p, sequence); });
    return {normed, delta, out};
}

void token_mix(const Tensor& normed, const Tensor& delta, const Tensor& mixes, const Tensors& moved) {
    TokenMix p{data(normed), data(delta), data(mixes), {}, static_cast<int>(normed.size(1))};
    for (int i = 0; i < 5; i++) p.moved[i] = data(moved[i]);
    at::parallel_for(0, normed.size(0), 8, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) kernels().token_mix(p, t);
    });
}

Shape describe(const Tensor& r, const Tensor& state, const Tensor& bounds) {
    TORCH_CHECK(state.is_contiguous() && state.size(3) <= CPU_LARGEST_HEAD, "decode: states are contiguous, heads at most ",
                CPU_LARGEST_HEAD);
    Shape shape{};
    shape.n_sequences = state.size(0), shape.n_head = state.size(1), shape.head_size = state.size(3), shape.total = r.size(0);
    shape.interval = CPU_INTERVAL_TOKENS, shape.dtype = FLOAT32;
    shape.bounds = shape.host_bounds = bounds.const_data_ptr<int>();
    return shape;
}

// What v7's products made -> the gated, normed output of the recurrence; the state moves on in place. r ... a are overwritten.
// vectors: w0, a0, v0, k_k, k_a, r_k, ln_x.weight, ln_x.bias.
Tensor advance7(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& a,
                const std::optional<Tensor>& v_gate, const Tensor& g, const std::optional<Tensor>& v_first, const Tensors& vectors,
                double eps, const Tensor& state, const Tensor& bounds) {
    const Shape shape = describe(r, state, bounds);
    Tensor y = at::empty_like(r), kappa = at::empty_like(r);
    const Around7 around{data(r), data(k), data(v), data(w), data(a), data(kappa), data(y), data(v_first), data(v_gate), data(g),
                         data(vectors[0]), data(vectors[1]), data(vectors[2]), data(vectors[3]), data(vectors[4]),
                         data(vectors[5]), data(vectors[6]), data(vectors[7]), static_cast<float>(eps), shape.bounds,
                         shape.n_head, shape.head_size};
    const Forward7 x{around.r, around.w, around.k, around.v, around.kappa, around.a, data(state), around.y, data(state), nullptr};
    spread(shape.n_sequences * shape.n_head, [&](int64_t item) {
        const int sequence = item / shape.n_head, head = item % shape.n_head;
        kernels().before7(around, sequence, head);
        cpu_kernels().forward7(shape, x, sequence, head);
        kernels().after7(around, sequence, head);
    });
    return y;
}

// The same for v6. vectors: time_decay, time_faaaa, ln_x.weight, ln_x.bias.
Tensor advance6(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& g, const Tensors& vectors,
                double eps, const Tensor& state, const Tensor& bounds) {
    const Shape shape = describe(r, state, bounds);
    Tensor y = at::empty_like(r);
    const Around6 around{data(w), data(y), data(g), data(vectors[0]), data(vectors[2]), data(vectors[3]), static_cast<float>(eps),
                         shape.bounds, shape.n_head, shape.head_size};
    const Forward6 x{data(r), data(w), data(k), data(v), data(vectors[1]), data(state), data(y), data(state), nullptr};
    spread(shape.n_sequences * shape.n_head, [&](int64_t item) {
        const int sequence = item / shape.n_head, head = item % shape.n_head;
        kernels().before6(around, sequence, head);
        cpu_kernels().forward6(shape, x, sequence, head);
        kernels().after6(around, sequence, head);
    });
    return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) {
    library.def(
        "decode_products(Tensor[] x, Tensor[] panels, Tensor[] scales, int[] outs, int[] kinds, int[] activations, "
        "Tensor? add=None, Tensor? gate=None) -> Tensor[]", products);
    library.def(
        "decode_norm_mix(Tensor x, Tensor weight, Tensor bias, float eps, Tensor shift, Tensor bounds, Tensor mixes) -> "
        "(Tensor, Tensor, Tensor)", norm_mix);
    library.def("decode_token_mix(Tensor normed, Tensor delta, Tensor mixes, Tensor[] moved) -> ()", token_mix);
    library.def(
        "decode_advance7(Tensor r, Tensor k, Tensor v, Tensor w, Tensor a, Tensor? v_gate, Tensor g, Tensor? v_first, "
        "Tensor[] vectors, float eps, Tensor state, Tensor bounds) -> Tensor", advance7);
    library.def(
        "decode_advance6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor g, Tensor[] vectors, float eps, Tensor state, "
        "Tensor bounds) -> Tensor", advance6);
}
