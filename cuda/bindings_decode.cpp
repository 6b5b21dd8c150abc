// torch.ops.rwkv_wkv.decode_*: what src/model/decode.py and src/generation/sampler.py call on the CPU. They trust their callers
// in shapes and dtypes: float32, contiguous, packed sequences with int32 borders [S + 1].
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "decode_kernels.h"

namespace {

using namespace wkv;
using at::Tensor;
using Tensors = std::vector<Tensor>;

const DecodeKernels& kernels() {
    static const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__) && !defined(__clang__)
    static const bool pairs = __builtin_cpu_supports("avx512bf16");
    if (capability == "AVX512" && pairs) return AVX512BF16_DECODE;
#endif
    return capability == "AVX512" ? AVX512_DECODE : capability == "AVX2" ? AVX2_DECODE : PLAIN_DECODE;
}

// Calls f(i) for i < n, each taken by whichever thread is free.
template <class F>
void spread(int64_t n, F f) {
    if (n == 1) return f(0);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t i = next++; i < n; i = next++) f(i);
    });
}

float* data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }
float* data(const std::optional<Tensor>& x) { return x ? data(*x) : nullptr; }

// y_i = activation_i(x_i W_i^T), all at once; with `add`, the one product is added to it in place, times `gate`.
// kinds: the panel's kind, and 16 more where x is to be rounded to bfloat16.
Tensors products(const Tensors& x, const Tensors& panels, const Tensors& scales, at::IntArrayRef outs, at::IntArrayRef kinds,
                 at::IntArrayRef activations, const std::optional<Tensor>& add, const std::optional<Tensor>& gate) {
    Tensors results, rounded;
    std::vector<Product> work;
    std::vector<int64_t> before{0};
    for (size_t i = 0; i < x.size(); i++) {
        const int rows = x[i].size(0), in = x[i].size(1), out = outs[i];
        const bool in_bfloat16 = kinds[i] & 16;
        TORCH_CHECK(x[i].scalar_type() == at::kFloat && x[i].is_contiguous(), "decode: x is contiguous float32");
        results.push_back(add ? *add : at::empty({rows, out}, x[i].options()));
        Product p{x[i].const_data_ptr(), panels[i].const_data_ptr(), static_cast<const float*>(scales[i].const_data_ptr()),
                  data(results.back()), data(gate), rows, in, out, static_cast<int>(kinds[i] & 15),
                  static_cast<int>(activations[i]), in_bfloat16, add.has_value()};
        if (in_bfloat16) {
            const int64_t width = (in + 1) / 2 * 2;
            rounded.push_back(at::empty({rows, width}, x[i].options()));
            float* to = data(rounded.back());
            // A pair takes 4 bytes with AVX-512's bfloat16 and 8 without; rows follow each other without a gap either way.
            const int64_t stride = &kernels() == &AVX512BF16_DECODE ? width / 2 : width;
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

// Terms by size: numbers in (0, 1] whose bits agree down to the fourth of the mantissa share a bucket.
constexpr int BUCKETS = (0x3f800000 >> 19) + 1;
int bucket_of(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 19;
}

// The smallest term that stays: that at which the sum from the largest down reaches `share`, and not below the top_k-th.
float cutoff_of(const float* terms, int64_t n, double share, int64_t top_k) {
    std::vector<double> sums(BUCKETS, 0.0);
    std::vector<int64_t> counts(BUCKETS, 0);
    for (int64_t i = 0; i < n; i++) {
        const int bucket = bucket_of(terms[i]);
        sums[bucket] += terms[i], counts[bucket]++;
    }
    double sum = 0;
    int64_t count = 0;
    for (int bucket = BUCKETS - 1; bucket >= 0; bucket--) {
        if (sum + sums[bucket] < share && count + counts[bucket] < top_k) {
            sum += sums[bucket], count += counts[bucket];
            continue;
        }
        std::vector<float> members;
        for (int64_t i = 0; i < n; i++)
            if (bucket_of(terms[i]) == bucket) members.push_back(terms[i]);
        std::sort(members.begin(), members.end(), std::greater<float>());
        for (float term : members) {
            sum += term, count++;
            if (sum >= share || count >= top_k) return term;
        }
    }
    return 0;  // where even the sum of all rounds to less than the share
}

struct Draw {
    double presence, frequency, temperature, top_p;
    int64_t top_k;
};

int64_t draw(float* x, int64_t n, const bool* banned, const int* tokens, const float* counts, int length, double uniform,
             const Draw& how) {
    for (int i = 0; i < length; i++)
        x[tokens[i]] -= static_cast<float>(how.frequency) * counts[i] + static_cast<float>(how.presence);
    for (int64_t i = 0; i < n; i++)
        if (banned[i] && std::isfinite(x[i])) x[i] = -INFINITY;
    const int64_t likeliest = how.temperature == 0 ? std::max_element(x, x + n) - x : 0;
    const double total = kernels().softmax_terms(x, n);
    if (std::isnan(total)) return -1;
    if (how.temperature == 0) return likeliest;
    const bool nucleus = how.top_p < 1, few = how.top_k > 0 && how.top_k < n;
    const float cutoff = nucleus || few ? cutoff_of(x, n, nucleus ? how.top_p * total : INFINITY, few ? how.top_k : n + 1) : 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        // The largest is 1, so that a low temperature can't turn all of them to zero.
        x[i] = x[i] < cutoff ? 0 : how.temperature == 1 ? x[i] : std::pow(x[i], static_cast<float>(1 / how.temperature));
        sum += x[i];
    }
    const double target = std::min(uniform * sum, std::nextafter(sum, 0.0));
    double reached = 0;
    int64_t drawn = 0;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > 0) {
            reached += x[i], drawn = i;
            if (reached > target) break;
        }
    return drawn;
}

// One token for each row of logits [B, V], by uniforms [B] (float64); -1 where a logit is not finite. tokens, counts [B, C] and
// lengths [B] say what each row has drawn before.
Tensor sample(const Tensor& logits, const Tensor& banned, const Tensor& tokens, const Tensor& counts, const Tensor& lengths,
              const Tensor& uniforms, double presence, double frequency, double temperature, double top_p, int64_t top_k) {
    const int64_t rows = logits.size(0), n = logits.size(1), most = tokens.size(1);
    const Draw how{presence, frequency, temperature, top_p, top_k};
    Tensor drawn = at::empty({rows}, logits.options().dtype(at::kLong));
    const float* from = data(logits);
    spread(rows, [&](int64_t row) {
        std::vector<float> x(from + row * n, from + (row + 1) * n);
        drawn.data_ptr<int64_t>()[row] =
            draw(x.data(), n, banned.const_data_ptr<bool>(), tokens.const_data_ptr<int>() + row * most,
                 counts.const_data_ptr<float>() + row * most, lengths.const_data_ptr<int>()[row],
                 uniforms.const_data_ptr<double>()[row], how);
    });
    return drawn;
}

// Enter the tokens just drawn [B]: old counts decay, and the token's own grows by its weight [V].
void count(const Tensor& drawn, const Tensor& tokens, const Tensor& counts, const Tensor& lengths, const Tensor& weight,
           double decay) {
    const int64_t most = tokens.size(1);
    for (int64_t row = 0; row < drawn.size(0); row++) {
        int* seen = tokens.data_ptr<int>() + row * most;
        float* times = data(counts) + row * most;
        int& length = lengths.data_ptr<int>()[row];
        const int token = drawn.const_data_ptr<int64_t>()[row];
        for (int i = 0; i < length; i++) times[i] *= static_cast<float>(decay);
        int* const found = std::find(seen, seen + length, token);
        if (found == seen + length) {
            TORCH_CHECK(length < most, "decode: a row drew more tokens than its table has room for");
            seen[length] = token, times[length++] = 0;
        }
        times[found - seen] += weight.const_data_ptr<float>()[token];
    }
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
    library.def(
        "decode_sample(Tensor logits, Tensor banned, Tensor tokens, Tensor counts, Tensor lengths, Tensor uniforms, "
        "float presence, float frequency, float temperature, float top_p, int top_k) -> Tensor", sample);
    library.def(
        "decode_count(Tensor drawn, Tensor tokens, Tensor counts, Tensor lengths, Tensor weight, float decay) -> ()", count);
}
