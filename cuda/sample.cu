// Drawing a token for each row on a GPU (what is drawn from: sample.h); a block a row, in place in the row's logits.
//
// The nucleus's border and the token drawn are found without sorting: terms lie in (0, 1], so that their bits are in their order,
// and three passes sum them by the upper, middle and lower bits. Sums are whole numbers of 2^-40, which no order of adding changes:
// a row's token is the same in every batch and at every run.
#include "cuda_kernels.h"
#include "device.cuh"

namespace wkv {
namespace {

typedef unsigned long long Fixed;  // a sum of up to 2^23 terms, each at most 1

constexpr int THREADS = 512, BINS = 2048, BINS_A_THREAD = BINS / THREADS;
constexpr int LEVELS = 3;

__device__ __forceinline__ Fixed fixed(float x) { return static_cast<Fixed>(x * 1099511627776.0f); }

struct Shared {
    Fixed sums[BINS], partial[THREADS];
    int counts[BINS], part[THREADS];
    float most[THREADS];
    // Where a level's border lies: its bin (-1: nowhere), and what all larger bins hold; then, what was drawn.
    Fixed before;
    int bin, counted, token, place;
};

// Running totals of `partial` and `part` over the threads.
__device__ void scan(Shared& s) {
    const int thread = threadIdx.x;
    for (int distance = 1; distance < THREADS; distance *= 2) {
        const Fixed sum = thread < distance ? 0 : s.partial[thread - distance];
        const int count = thread < distance ? 0 : s.part[thread - distance];
        __syncthreads();
        s.partial[thread] += sum, s.part[thread] += count;
        __syncthreads();
    }
}

// The likeliest of what the row may draw, the first of equals, into most[0] and part[0]; most[0] is infinite where a logit is wrong.
__device__ void find_largest(const Sample& p, const SampledRow& now, float* x, Shared& s) {
    const int thread = threadIdx.x;
    const short* next = p.next + static_cast<long>(now.state) * p.vocabulary;
    const bool last = now.drawn + 1 == p.capacity;
    float largest = -INFINITY;
    int token = 0;
    for (int i = thread; i < p.vocabulary; i += THREADS) {
        float logit = x[i];
        if (!(logit < INFINITY)) largest = INFINITY;
        if (!may_be_drawn(next[i], last, p.n_blank)) x[i] = logit = -INFINITY;
        if (logit > largest) largest = logit, token = i;
    }
    s.most[thread] = largest, s.part[thread] = token;
    __syncthreads();
    for (int half = THREADS / 2; half; half /= 2) {
        if (thread < half) {
            const float other = s.most[thread + half];
            if (other > s.most[thread] || (other == s.most[thread] && s.part[thread + half] < s.part[thread]))
                s.most[thread] = other, s.part[thread] = s.part[thread + half];
        }
        __syncthreads();
    }
}

// The smallest term that stays; 0 where all do.
__device__ float find_cutoff(const Sample& p, const float* x, Shared& s) {
    const int thread = threadIdx.x, shift[LEVELS] = {19, 8, 0}, above[LEVELS] = {31, 19, 8};
    unsigned bits_above = 0;
    Fixed share = ~Fixed{0};
    int top_k = p.top_k > 0 ? p.top_k : p.vocabulary + 1;
    for (int level = 0; level < LEVELS; level++) {
        const unsigned mask = (1u << (above[level] - shift[level])) - 1;
        for (int bin = thread; bin < BINS; bin += THREADS) s.sums[bin] = 0, s.counts[bin] = 0;
        if (thread == 0) s.bin = -1;
        __syncthreads();
        for (int i = thread; i < p.vocabulary; i += THREADS) {
            const unsigned bits = __float_as_uint(x[i]);
            if (bits == 0 || bits >> above[level] != bits_above) continue;
            atomicAdd(&s.sums[bits >> shift[level] & mask], fixed(x[i]));
            atomicAdd(&s.counts[bits >> shift[level] & mask], 1);
        }
        __syncthreads();
        // The first thread has the largest bins.
        const int top = BINS - 1 - thread * BINS_A_THREAD;
        Fixed sum = 0;
        int count = 0;
        for (int bin = top; bin > top - BINS_A_THREAD; bin--) sum += s.sums[bin], count += s.counts[bin];
        s.partial[thread] = sum, s.part[thread] = count;
        __syncthreads();
        scan(s);
        if (level == 0 && p.top_p < 1) {
            share = static_cast<Fixed>(p.top_p * s.partial[THREADS - 1]);
            share += share == 0;  // the likeliest stays
        }
        const bool reached = s.partial[thread] >= share || s.part[thread] >= top_k;
        sum = s.partial[thread] - sum, count = s.part[thread] - count;
        if (reached && sum < share && count < top_k) {
            int bin = top;
            for (; sum + s.sums[bin] < share && count + s.counts[bin] < top_k; bin--) sum += s.sums[bin], count += s.counts[bin];
            s.bin = bin, s.before = sum, s.counted = count;
        }
        __syncthreads();
        if (s.bin < 0) return 0;
        bits_above = bits_above << (above[level] - shift[level]) | s.bin;
        share -= p.top_p < 1 ? s.before : 0, top_k -= s.counted;
        __syncthreads();
    }
    return __uint_as_float(bits_above);
}

// Inverts the cumulative distribution of the terms: s.token.
__device__ void invert(const Sample& p, const float* x, double uniform, Shared& s) {
    const int thread = threadIdx.x, chunk = (p.vocabulary + THREADS - 1) / THREADS, first = thread * chunk;
    const int end = first + chunk < p.vocabulary ? first + chunk : p.vocabulary;
    Fixed sum = 0;
    for (int i = first; i < end; i++) sum += fixed(x[i]);
    s.partial[thread] = sum, s.part[thread] = 0;
    __syncthreads();
    scan(s);
    const Fixed total = s.partial[THREADS - 1], point = static_cast<Fixed>(uniform * total), target = point < total ? point : total - 1;
    Fixed reached = s.partial[thread] - sum;
    if (reached <= target && target < s.partial[thread]) {
        int i = first;
        while ((reached += fixed(x[i])) <= target) i++;
        s.token = i;
    }
    __syncthreads();
}

// Counts the token drawn, older times for less.
__device__ void count(const Sample& p, int row, int token, Shared& s) {
    int* tokens = p.tokens + static_cast<long>(row) * p.capacity;
    float* counts = p.counts + static_cast<long>(row) * p.capacity;
    int& distinct = p.row[row].distinct;
    if (threadIdx.x == 0) s.place = distinct;
    __syncthreads();
    for (int i = threadIdx.x; i < distinct; i += THREADS) {
        counts[i] *= p.decay;
        if (tokens[i] == token) s.place = i;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (s.place == distinct) tokens[s.place] = token, counts[s.place] = 0, distinct++;
    counts[s.place] += p.weight[token];
}

__global__ void __launch_bounds__(THREADS) sample_rows(Sample p) {
    WKV_SHARED(memory);
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const int row = blockIdx.x, thread = threadIdx.x;
    const SampledRow now = p.row[row];
    if (now.ended) {
        if (thread == 0) p.drawn[row] = 0, p.drawn[p.rows + row] = now.ended;
        return;
    }
    float* x = p.logits + static_cast<long>(row) * p.vocabulary;
    const long first = static_cast<long>(row) * p.capacity;
    for (int i = thread; i < now.distinct; i += THREADS) x[p.tokens[first + i]] -= p.frequency * p.counts[first + i] + p.presence;
    __syncthreads();
    find_largest(p, now, x, s);
    const float largest = s.most[0];
    int token = s.part[0];
    __syncthreads();
    if (largest == INFINITY || largest == -INFINITY) {
        token = -1;
    } else if (p.temperature != 0) {
        for (int i = thread; i < p.vocabulary; i += THREADS) x[i] = expf(x[i] - largest);
        __syncthreads();
        const float cutoff = p.top_p < 1 || (p.top_k > 0 && p.top_k < p.vocabulary) ? find_cutoff(p, x, s) : 0;
        for (int i = thread; i < p.vocabulary; i += THREADS)
            x[i] = x[i] < cutoff ? 0 : p.temperature == 1 ? x[i] : powf(x[i], 1 / p.temperature);
        __syncthreads();
        invert(p, x, p.uniforms[first + now.drawn], s);
        token = s.token;
    }
    if (token >= 0) count(p, row, token, s);
    if (thread == 0) enter(p, row, token);
}

}  // namespace

int sample(const Sample& x, Stream stream) { return launch(sample_rows, dim3(x.rows), THREADS, sizeof(Shared), stream, x); }

}  // namespace wkv
