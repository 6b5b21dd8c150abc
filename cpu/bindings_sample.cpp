// torch.ops.rwkv_wkv.decode_sample on the CPU (what it does: sample.h), called by src/generation/sampler.py.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "bindings_decode.h"
#include "bindings_sample.h"

namespace {

using namespace wkv;

// Terms by size: numbers in (0, 1] whose bits agree down to the fourth of the mantissa share a bucket.
constexpr int BUCKETS = (0x3f800000 >> 19) + 1;
int bucket_of(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 19;
}

// The smallest of these terms that stays: that at which the sum from the largest down reaches `share`, and not below the top_k-th;
// 0 where neither is reached.
float cutoff_of(const float* terms, const std::vector<int>& tokens, double share, int64_t top_k) {
    std::vector<double> sums(BUCKETS, 0.0);
    std::vector<int64_t> counts(BUCKETS, 0);
    for (int token : tokens) {
        const int bucket = bucket_of(terms[token]);
        sums[bucket] += terms[token], counts[bucket]++;
    }
    double sum = 0;
    int64_t count = 0;
    for (int bucket = BUCKETS - 1; bucket >= 0; bucket--) {
        if (sum + sums[bucket] < share && count + counts[bucket] < top_k) {
            sum += sums[bucket], count += counts[bucket];
            continue;
        }
        std::vector<float> members;
        for (int token : tokens)
            if (bucket_of(terms[token]) == bucket) members.push_back(terms[token]);
        std::sort(members.begin(), members.end(), std::greater<float>());
        for (float term : members) {
            sum += term, count++;
            if (sum >= share || count >= top_k) return term;
        }
    }
    return 0;
}

// The tokens whose terms are larger than `least`, in their order.
std::vector<int> larger(const float* terms, int n, float least) {
    std::vector<int> tokens(n);
    int found = 0;
    for (int i = 0; i < n; i++) {
        tokens[found] = i;
        found += terms[i] > least;
    }
    tokens.resize(found);
    return tokens;
}

int likeliest(const float* logits, const short* next, bool last, const Sample& p) {
    int best = -1;
    for (int i = 0; i < p.vocabulary; i++)
        if ((best < 0 || logits[i] > logits[best]) && may_be_drawn(next[i], last, p.n_blank)) best = i;
    return best;
}

int draw(const Sample& p, int row) {
    const int n = p.vocabulary;
    const int64_t first = static_cast<int64_t>(row) * p.capacity;
    const SampledRow& now = p.row[row];
    const bool last = now.drawn + 1 == p.capacity;
    const short* next = p.next + static_cast<int64_t>(now.state) * n;
    float* x = p.logits + static_cast<int64_t>(row) * n;
    for (int i = 0; i < now.distinct; i++) x[p.tokens[first + i]] -= p.frequency * p.counts[first + i] + p.presence;
    const int greedy = p.temperature == 0 ? likeliest(x, next, last, p) : 0;
    const double total = kernels().softmax_terms(x, next, last, p.n_blank, n);
    if (std::isnan(total)) return -1;
    if (p.temperature == 0) return greedy;
    const bool nucleus = p.top_p < 1, few = p.top_k > 0 && p.top_k < n;
    // All smaller terms together are not what is missing to 1.
    std::vector<int> kept = larger(x, n, nucleus ? (1 - p.top_p) * total / n : 0);
    if (nucleus || few) {
        const float cutoff = cutoff_of(x, kept, nucleus ? p.top_p * total : INFINITY, few ? p.top_k : n + 1);
        if (cutoff > 0)
            std::erase_if(kept, [&](int token) { return x[token] < cutoff; });
        else
            kept = larger(x, n, 0);  // even the sum of all rounds to less than the share
    }
    double sum = 0;
    for (int token : kept) {
        if (p.temperature != 1) x[token] = std::pow(x[token], 1 / p.temperature);
        sum += x[token];
    }
    const double target = std::min(p.uniforms[first + now.drawn] * sum, std::nextafter(sum, 0.0));
    double reached = 0;
    for (int token : kept)
        if ((reached += x[token]) > target) return token;
    return kept.back();
}

void count(const Sample& p, int row, int token) {
    int* seen = p.tokens + static_cast<int64_t>(row) * p.capacity;
    float* times = p.counts + static_cast<int64_t>(row) * p.capacity;
    int& distinct = p.row[row].distinct;
    for (int i = 0; i < distinct; i++) times[i] *= p.decay;
    int* const found = std::find(seen, seen + distinct, token);
    if (found == seen + distinct) seen[distinct] = token, times[distinct++] = 0;
    times[found - seen] += p.weight[token];
}

void draw_rows(const Sample& p, at::Device) {
    spread(p.rows, [&](int64_t row) {
        SampledRow& now = p.row[row];
        if (now.ended) {
            p.drawn[row] = 0, p.drawn[p.rows + row] = now.ended;
            return;
        }
        const int token = draw(p, row);
        if (token >= 0) count(p, row, token);
        enter(p, row, token);
    });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) {
    library.def(
        "decode_sample(Tensor(a!) logits, Tensor next, int n_blank, Tensor weight, Tensor uniforms, Tensor(b!) tokens, "
        "Tensor(c!) counts, Tensor(d!) rows, float presence, float frequency, float decay, float temperature, float top_p, "
        "int top_k) -> Tensor");
}

TORCH_LIBRARY_IMPL(rwkv_wkv, CPU, library) { library.impl("decode_sample", decode_sample<draw_rows>); }
