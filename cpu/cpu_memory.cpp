// Memory of large CPU tensors that is used again: torch.ops.rwkv_wkv.recycle_memory() installs it for the whole process.
//
// A training step frees and asks for thousands of activations of a few sizes. glibc's aligned allocation wants a little more than
// the tensor's bytes and so seldom fits where one of the same size was freed: after some steps its heap is half holes. Here every
// tensor of a megabyte and more has pages of its own, and once freed they wait for the next tensor of about that size.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t LEAST = size_t{1} << 20;  // smaller ones go to torch's own allocator
constexpr size_t IDLE = size_t{64} << 20;  // bytes kept idle when none of them fits and pages must be asked for

struct Pages {
    std::mutex mutex;
    std::multimap<size_t, void*> idle;
    std::unordered_map<void*, size_t> sizes;  // of idle and used ones
    size_t idle_bytes = 0;

    // To an eighth of the power of two below at most, so that nearly equal sizes are one.
    static size_t rounded(size_t bytes) {
        size_t step = LEAST / 8;
        while (step * 16 < bytes) step *= 2;
        return (bytes + step - 1) / step * step;
    }

    void* take(size_t bytes) {
        bytes = rounded(bytes);
        const std::lock_guard<std::mutex> guard(mutex);
        auto found = idle.lower_bound(bytes);
        if (found != idle.end() && found->first <= bytes + bytes / 8) {
            void* at = found->second;
            idle_bytes -= found->first;
            idle.erase(found);
            return at;
        }
        give_back(IDLE);
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) return nullptr;
        sizes[at] = bytes;
        return at;
    }

    // Whether they are pages of its own.
    bool put(void* at) {
        const std::lock_guard<std::mutex> guard(mutex);
        const auto found = sizes.find(at);
        if (found == sizes.end()) return false;
        idle.emplace(found->second, at);
        idle_bytes += found->second;
        return true;
    }

    // The largest first, until at most so many bytes are idle.
    void give_back(size_t most) {
        while (idle_bytes > most) {
            const auto largest = std::prev(idle.end());
            idle_bytes -= largest->first;
            munmap(largest->second, largest->first);
            sizes.erase(largest->second);
            idle.erase(largest);
        }
    }
};

// Never destroyed: tensors outlive static variables.
Pages& pages() {
    static Pages& only = *new Pages;
    return only;
}

void give_back(void* at) {
    if (!pages().put(at)) c10::GetDefaultCPUAllocator()->raw_deallocate(at);
}

struct Recycler final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* at = bytes < LEAST ? nullptr : pages().take(bytes);
        // Torch's own also tells of memory that is full.
        if (at == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
        return {at, at, give_back, c10::Device(c10::kCPU)};
    }
    // Torch's matrix products ask for scratch memory without a tensor around it, and give it back by this.
    c10::DeleterFnPtr raw_deleter() const override { return give_back; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void recycle_memory() {
    static Recycler& only = *new Recycler;
    c10::SetCPUAllocator(&only, /*priority=*/255);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_wkv, library) { library.def("recycle_memory() -> ()", recycle_memory); }
