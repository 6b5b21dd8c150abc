// torch.classes.rwkv_wkv.Weights, Block and Blocks: the model's step on the CPU, called by src/model/panels.py and decode.py.
// They trust their caller in shapes and dtypes: float32, contiguous, packed sequences with int32 borders [S + 1]. Classes, so
// that lists are read once, and a step is one call: calling for each block from Python costs a tenth of a small model's step.
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>

#include "bindings_decode.h"

namespace {

using namespace wkv;
using Integers = std::vector<int64_t>;
using Floats = std::vector<float*>;  // matrices, a row for each token

// Memory for one call, of so many rows.
struct Scratch {
    int64_t rows;
    Tensors held{};

    float* take(int64_t width) { return data(held.emplace_back(at::empty({rows * width}))); }
    Floats take(const Integers& widths) {
        Floats parts;
        for (const int64_t width : widths) parts.push_back(take(width));
        return parts;
    }
};

// Weights in panels, and what is done to their products.
struct Weights : torch::CustomClassHolder {
    Tensors panels, scales;
    Integers ins, outs, kinds, activations;  // a kind: a Panel, and IN_BFLOAT16 more where x is to be rounded to it

    Weights(Tensors panels, Tensors scales, Integers ins, Integers outs, Integers kinds, Integers activations)
        : panels(std::move(panels)), scales(std::move(scales)), ins(std::move(ins)), outs(std::move(outs)),
          kinds(std::move(kinds)), activations(std::move(activations)) {}

    // y_i = activation_i(x_i W_i^T), all at once, or y_i += gate * that where told to add.
    void multiply(Floats x, const Floats& y, Scratch& scratch, bool add = false, const float* gate = nullptr) const {
        const int rows = scratch.rows, blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
        std::vector<Product> work;
        Integers before{0};
        for (size_t i = 0; i < x.size(); i++) {
            if (kinds[i] & IN_BFLOAT16) x[i] = rounded(x[i], ins[i], scratch);
            work.push_back({x[i], panels[i].const_data_ptr(), static_cast<const float*>(scales[i].const_data_ptr()), y[i], gate,
                            rows, static_cast<int>(ins[i]), static_cast<int>(outs[i]), static_cast<int>(kinds[i]),
                            static_cast<int>(activations[i]), add});
            before.push_back(before.back() + blocks * ((outs[i] + PANEL_OUT - 1) / PANEL_OUT));
        }
        const auto one = [&](int64_t item) {
            const auto i = std::upper_bound(before.begin(), before.end(), item) - before.begin() - 1;
            const int panel = static_cast<int>(item - before[i]) / blocks, block = static_cast<int>(item - before[i]) % blocks;
            kernels().product(work[i], panel, block * ROWS_AT_ONCE, std::min(rows, (block + 1) * ROWS_AT_ONCE));
        };
        // Each thread reads panels that follow each other; taken one by one by whoever is free, a row of bfloat16 takes a sixth more.
        at::parallel_for(0, before.back(), 1, [&](int64_t first, int64_t last) {
            for (int64_t item = first; item < last; item++) one(item);
        });
    }

    static float* rounded(const float* x, int64_t in, Scratch& scratch) {
        // Two inputs take 4 bytes with AVX-512's bfloat16 and 8 without.
        const int64_t stride = &kernels() == &AVX512BF16_DECODE ? (in + 1) / 2 : in;
        float* to = scratch.take(stride);
        at::parallel_for(0, scratch.rows, 16, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) kernels().round_row(x + row * in, to + row * stride, in);
        });
        return to;
    }
};

// For Python: as many results as x, or `add` itself.
Tensors products(const c10::intrusive_ptr<Weights>& weights, const Tensors& x, const std::optional<Tensor>& add,
                 const std::optional<Tensor>& gate) {
    Tensors results;
    Floats from, to;
    for (size_t i = 0; i < x.size(); i++) {
        TORCH_CHECK(x[i].scalar_type() == at::kFloat && x[i].is_contiguous(), "decode: x is contiguous float32");
        from.push_back(data(x[i]));
        results.push_back(add ? *add : at::empty({x[i].size(0), weights->outs[i]}, x[i].options()));
        to.push_back(data(results.back()));
    }
    Scratch scratch{x[0].size(0)};
    weights->multiply(from, to, scratch, add.has_value(), data(gate));
    return results;
}

// A layer's weights, listed as block6 and block7 take them.
struct Block : torch::CustomClassHolder {
    std::vector<c10::intrusive_ptr<Weights>> products;
    Tensors vectors;  // first the two layer norms' weights and biases and the mixes [n, D] behind each
    float eps, head_eps;

    Block(std::vector<c10::intrusive_ptr<Weights>> products, Tensors vectors, double eps, double head_eps)
        : products(std::move(products)), vectors(std::move(vectors)), eps(eps), head_eps(head_eps) {}

    float* vector(int i) const { return data(vectors[i]); }
};

struct Mixed {
    float *normed, *delta;  // delta: what each token's predecessor differs by
    Floats mixes;
};

// The first or second layer norm of x [T, D], and its mixes with each token's predecessor; `shift` [S, D] moves on in place.
Mixed norm_mix(const Block& block, bool second, const float* x, const Tensor& mixes, const Tensor& shift, const Tensor& bounds,
               Scratch& scratch) {
    TORCH_CHECK(shift.is_contiguous(), "decode: states are contiguous");
    const int width = shift.size(1), n_mixes = mixes.size(0), norm = second ? 2 : 0;
    float* out = scratch.take(n_mixes * width);
    const NormMix p{x, block.vector(norm), block.vector(norm + 1), scratch.take(width), scratch.take(width), data(shift), out,
                    data(mixes), bounds.const_data_ptr<int>(), block.eps, static_cast<int>(scratch.rows), width, n_mixes};
    spread(shift.size(0), [&](int64_t sequence) { kernels().norm_mix(p, sequence); });
    Mixed mixed{p.normed, p.delta};
    for (int i = 0; i < n_mixes; i++) mixed.mixes.push_back(out + i * scratch.rows * width);
    return mixed;
}

Shape describe(int64_t total, const Tensor& state, const Tensor& bounds) {
    TORCH_CHECK(state.is_contiguous() && state.size(3) <= CPU_LARGEST_HEAD, "decode: states are contiguous, heads at most ",
                CPU_LARGEST_HEAD);
    Shape shape{};
    shape.n_sequences = state.size(0), shape.n_head = state.size(1), shape.head_size = state.size(3), shape.total = total;
    shape.interval = CPU_INTERVAL_TOKENS, shape.dtype = FLOAT32;
    shape.bounds = shape.host_bounds = bounds.const_data_ptr<int>();
    return shape;
}

// A block of RWKV-7; the formulas are those of src/model/rwkv7.py. x [T, D] and the state move on in place; returns v.
Tensor block7(const Block& block, const Tensor& x, const std::optional<Tensor>& v_first,
              const Tensor& att_shift, const Tensor& wkv, const Tensor& ffn_shift, const Tensor& bounds) {
    TORCH_CHECK(x.is_contiguous(), "decode: x is contiguous");
    const auto &wide = *block.products[0], &narrow = *block.products[1], &output = *block.products[2];
    const auto &key = *block.products[3], &value = *block.products[4];
    const auto vector = [&](int i) { return block.vector(6 + i); };
    const int64_t width = x.size(1);
    Scratch scratch{x.size(0)};

    const Tensor v = at::empty_like(x);
    Floats inputs = norm_mix(block, false, data(x), block.vectors[4], att_shift, bounds, scratch).mixes;
    if (v_first) inputs.push_back(inputs[2]);
    Floats to = scratch.take(wide.outs);
    to[2] = data(v);
    wide.multiply(inputs, to, scratch);
    const Floats low = scratch.take(narrow.outs);
    narrow.multiply({to.begin() + 3, to.end()}, low, scratch);

    const Shape shape = describe(x.size(0), wkv, bounds);
    const Around7 around{to[0], to[1], to[2], low[0], low[1], scratch.take(width), scratch.take(width), data(v_first),
                         v_first ? low[3] : nullptr, low[2], vector(0), vector(1), vector(2), vector(3), vector(4), vector(5),
                         vector(6), vector(7), block.head_eps, shape.bounds, shape.n_head, shape.head_size};
    const Forward7 forward{to[0], around.w, to[1], to[2], around.kappa, around.a, data(wkv), around.y, data(wkv), nullptr};
    spread(shape.n_sequences * shape.n_head, [&](int64_t item) {
        const int sequence = item / shape.n_head, head = item % shape.n_head;
        kernels().before7(around, sequence, head);
        cpu_kernels().forward7(shape, forward, sequence, head);
        kernels().after7(around, sequence, head);
    });
    output.multiply({around.y}, {data(x)}, scratch, true);

    const Floats inner = scratch.take(key.outs);
    key.multiply(norm_mix(block, true, data(x), block.vectors[5], ffn_shift, bounds, scratch).mixes, inner, scratch);
    value.multiply(inner, {data(x)}, scratch, true);
    return v;
}

// The same for RWKV-6 and src/model/rwkv6.py.
void block6(const Block& block, const Tensor& x, const Tensor& att_shift, const Tensor& wkv,
            const Tensor& ffn_shift, const Tensor& bounds) {
    TORCH_CHECK(x.is_contiguous(), "decode: x is contiguous");
    const auto &mix_in = *block.products[0], &mix_out = *block.products[1], &wide = *block.products[2];
    const auto &decay = *block.products[3], &output = *block.products[4];
    const auto &up = *block.products[5], &value = *block.products[6];
    const auto vector = [&](int i) { return block.vector(7 + i); };
    const int width = x.size(1);
    Scratch scratch{x.size(0)};

    const Mixed first = norm_mix(block, false, data(x), block.vectors[4], att_shift, bounds, scratch);
    const Floats low = scratch.take(mix_in.outs), moved = scratch.take(mix_out.outs), to = scratch.take(wide.outs);
    mix_in.multiply(Floats(5, first.mixes[0]), low, scratch);
    mix_out.multiply(low, moved, scratch);
    TokenMix mix{first.normed, first.delta, block.vector(6), {}, width};
    std::copy(moved.begin(), moved.end(), mix.moved);
    at::parallel_for(0, x.size(0), 8, [&](int64_t from, int64_t until) {
        for (int64_t t = from; t < until; t++) kernels().token_mix(mix, t);
    });
    wide.multiply(moved, to, scratch);
    float* w = scratch.take(width);
    decay.multiply({to[0]}, {w}, scratch);

    const Shape shape = describe(x.size(0), wkv, bounds);
    const Around6 around{w, scratch.take(width), to[4], vector(0), vector(2), vector(3), block.head_eps, shape.bounds,
                         shape.n_head, shape.head_size};
    const Forward6 forward{to[3], w, to[1], to[2], vector(1), data(wkv), around.y, data(wkv), nullptr};
    spread(shape.n_sequences * shape.n_head, [&](int64_t item) {
        const int sequence = item / shape.n_head, head = item % shape.n_head;
        kernels().before6(around, sequence, head);
        cpu_kernels().forward6(shape, forward, sequence, head);
        kernels().after6(around, sequence, head);
    });
    output.multiply({around.y}, {data(x)}, scratch, true);

    const Floats inner = scratch.take(up.outs);
    up.multiply(norm_mix(block, true, data(x), block.vectors[5], ffn_shift, bounds, scratch).mixes, inner, scratch);
    value.multiply({inner[0]}, {data(x)}, scratch, true, inner[1]);
}

// All blocks, one after another; each list of states has a tensor a layer.
struct Blocks : torch::CustomClassHolder {
    std::vector<c10::intrusive_ptr<Block>> blocks;

    explicit Blocks(std::vector<c10::intrusive_ptr<Block>> blocks) : blocks(std::move(blocks)) {}

    void advance6(const Tensor& x, const Tensors& att_shift, const Tensors& wkv, const Tensors& ffn_shift, const Tensor& bounds) {
        for (size_t i = 0; i < blocks.size(); i++) block6(*blocks[i], x, att_shift[i], wkv[i], ffn_shift[i], bounds);
    }
    void advance7(const Tensor& x, const Tensors& att_shift, const Tensors& wkv, const Tensors& ffn_shift, const Tensor& bounds) {
        std::optional<Tensor> v_first;
        for (size_t i = 0; i < blocks.size(); i++) {
            const Tensor v = block7(*blocks[i], x, v_first, att_shift[i], wkv[i], ffn_shift[i], bounds);
            if (i == 0) v_first = v;
        }
    }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) {
    library.class_<Weights>("Weights")
        .def(torch::init<Tensors, Tensors, Integers, Integers, Integers, Integers>())
        .def("multiply", products);
    library.class_<Block>("Block").def(torch::init<std::vector<c10::intrusive_ptr<Weights>>, Tensors, double, double>());
    library.class_<Blocks>("Blocks")
        .def(torch::init<std::vector<c10::intrusive_ptr<Block>>>())
        .def("advance6", &Blocks::advance6)
        .def("advance7", &Blocks::advance7);
}
