// Runs CUDA kernels' own source on the CPU, for tests: blocks one after another, a block's threads as fibers that change
// places at barriers. Order among threads alternates between barriers, so that a missing barrier shows; shared memory starts
// as NaN in every block and must not be written past its end. Slow, single-threaded, and for no other use.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
    float x, y, z, w;
};

typedef void* cudaStream_t;

namespace host {

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false;
    State state = READY;
    std::vector<char> stack;
};

struct Machine {
    std::vector<Fiber> fibers;
    ucontext_t entry;
    jmp_buf scheduler;
    std::function<void()> body;
    std::vector<float> shared;
    std::vector<float> exchanged;  // one slot a thread, for shuffles
    int current = 0;
};

inline Machine machine;
inline dim3 thread_index, block_index, block_size, grid_size;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "kernel on the host: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
    std::abort();
}

inline void wait(State barrier) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = barrier;
    if (_setjmp(fiber.place) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_fiber() {
    machine.body();
    machine.fibers[machine.current].state = DONE;
    _longjmp(machine.scheduler, 1);
}

inline void resume(int thread) {
    Fiber& fiber = machine.fibers[thread];
    machine.current = thread;
    thread_index = dim3(thread);
    if (_setjmp(machine.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    setcontext(&fiber.context);
}

// Lets go the lanes of a warp that all wait for one another, then the block; false where nobody can go on.
inline bool release() {
    int threads = static_cast<int>(machine.fibers.size()), at_block = 0, done = 0;
    bool any = false;
    for (int first = 0; first < threads; first += 32) {
        int last = first + 32 < threads ? first + 32 : threads, waiting = 0, live = 0;
        for (int t = first; t < last; t++) {
            State state = machine.fibers[t].state;
            waiting += state == AT_WARP_BARRIER, live += state != DONE, at_block += state == AT_BLOCK_BARRIER, done += state == DONE;
        }
        if (waiting && waiting == live) {
            for (int t = first; t < last; t++)
                if (machine.fibers[t].state == AT_WARP_BARRIER) machine.fibers[t].state = READY;
            any = true;
        }
    }
    if (any) return true;
    if (at_block == 0) return false;
    if (at_block != threads) fail(done ? "a thread ended while others wait at a barrier" : "barriers of block and warp are mixed up");
    for (Fiber& fiber : machine.fibers) fiber.state = READY;
    return true;
}

inline void run_block(int threads, size_t shared_bytes) {
    const float guard = 12345.678f;
    size_t floats = (shared_bytes + 3) / 4;
    machine.shared.assign(floats + 64, std::numeric_limits<float>::quiet_NaN());
    for (size_t i = floats; i < floats + 64; i++) machine.shared[i] = guard;
    machine.exchanged.assign(threads, 0.0f);
    machine.fibers.resize(threads);
    for (Fiber& fiber : machine.fibers) {
        fiber.stack.resize(1 << 16);
        fiber.started = false, fiber.state = READY;
    }
    bool backwards = false;
    do {
        for (int i = 0; i < threads; i++) {
            int thread = backwards ? threads - 1 - i : i;
            if (machine.fibers[thread].state == READY) resume(thread);
        }
        backwards = !backwards;
    } while (release());
    for (Fiber& fiber : machine.fibers)
        if (fiber.state != DONE) fail("a block stands still");
    for (size_t i = floats; i < floats + 64; i++)
        if (machine.shared[i] != guard) fail("shared memory was written past its end");
}

}  // namespace host

#define threadIdx host::thread_index
#define blockIdx host::block_index
#define blockDim host::block_size
#define gridDim host::grid_size
#define WKV_SHARED(name) float* name = host::machine.shared.data()

inline void __syncthreads() { host::wait(host::AT_BLOCK_BARRIER); }
inline void __syncwarp(unsigned = 0xffffffffu) { host::wait(host::AT_WARP_BARRIER); }

inline float __shfl_sync(unsigned, float x, int lane) {
    int self = host::machine.current;
    host::machine.exchanged[self] = x;
    __syncwarp();
    float got = host::machine.exchanged[self / 32 * 32 + lane % 32];
    __syncwarp();
    return got;
}
inline float __shfl_xor_sync(unsigned mask, float x, int other) { return __shfl_sync(mask, x, (host::machine.current % 32) ^ other); }

inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}
template <class T>
T atomicAdd(T* at, T x) {
    const T before = *at;
    *at += x;
    return before;
}
// The bytes of y:x, lowest 0, that the four digits of `which` name, lowest first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned z = 0;
    for (int i = 0; i < 4; i++) z |= static_cast<unsigned>(bytes >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return z;
}
inline int min(int x, int y) { return x < y ? x : y; }
inline float __expf(float x) { return std::exp(x); }

namespace wkv {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
    host::grid_size = grid, host::block_size = dim3(threads);
    host::machine.body = [=] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                host::block_index = dim3(x, y, z);
                host::run_block(threads, shared_bytes);
            }
    return 0;
}

}  // namespace wkv
