// torch.ops.rwkv_wkv.available_instructions(), instructions() and use_instructions(name), called by src/kernels/__init__.py.
#include "instructions.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

namespace {

using namespace wkv;

struct Set {
    const char* name;
    bool here;  // whether this processor has it
    const CpuKernels* recurrences;
    const DecodeKernels* decoding;
};

#if defined(__x86_64__)
#define HAS(feature) bool(__builtin_cpu_supports(feature))
#else
#define HAS(feature) false
#endif

// The highest first.
const std::vector<Set>& sets() {
    static const bool avx2 = HAS("avx2") && HAS("fma");
    static const bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
#if defined(__clang__)
    static const bool pairs = false;  // cpu_avx512bf16.cpp is built for them by GCC only
#else
    static const bool pairs = avx512 && HAS("avx512bf16");
#endif
    static const std::vector<Set> all{{"avx512bf16", pairs, &AVX512_KERNELS, &AVX512BF16_DECODE},
                                      {"avx512", avx512, &AVX512_KERNELS, &AVX512_DECODE},
                                      {"avx2", avx2, &AVX2_KERNELS, &AVX2_DECODE},
                                      {"default", true, &PLAIN_KERNELS, &PLAIN_DECODE}};
    return all;
}

const Set* find(const std::string& name) {
    for (const Set& set : sets())
        if (set.here && set.name == name) return &set;
    return nullptr;
}

// Torch's own reading of the processor counts, so that its ATEN_CPU_CAPABILITY rules the kernels too.
const Set* highest() {
    const std::string capability = at::get_cpu_capability();
    const Set* found = nullptr;
    if (capability == "AVX512") found = find("avx512bf16") ? find("avx512bf16") : find("avx512");
    if (capability == "AVX2") found = find("avx2");
    return found ? found : find("default");
}

std::atomic<const Set*>& chosen() {
    static std::atomic<const Set*> set{highest()};
    return set;
}

std::vector<std::string> available_instructions() {
    std::vector<std::string> names;
    for (const Set& set : sets())
        if (set.here) names.push_back(set.name);
    return names;
}

void use_instructions(const std::string& name) {
    const Set* set = find(name);
    TORCH_CHECK(set, "wkv: this processor has no ", name);
    chosen() = set;
}

std::string instructions() { return chosen().load()->name; }

}  // namespace

const CpuKernels& wkv::cpu_kernels() { return *chosen().load(std::memory_order_relaxed)->recurrences; }
const DecodeKernels& wkv::kernels() { return *chosen().load(std::memory_order_relaxed)->decoding; }

TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) {
    library.def("available_instructions", available_instructions);
    library.def("instructions", instructions);
    library.def("use_instructions", use_instructions);
}
