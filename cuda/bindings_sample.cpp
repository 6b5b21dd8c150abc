// torch.ops.rwkv_wkv.decode_sample and decode_count: drawing tokens on the CPU, called by src/generation/sampler.py.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "bindings_decode.h"

namespace {

using namespace wkv;

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
        "decode_sample(Tensor logits, Tensor banned, Tensor tokens, Tensor counts, Tensor lengths, Tensor uniforms, "
        "float presence, float frequency, float temperature, float top_p, int top_k) -> Tensor", sample);
    library.def(
        "decode_count(Tensor drawn, Tensor tokens, Tensor counts, Tensor lengths, Tensor weight, float decay) -> ()", count);
}
