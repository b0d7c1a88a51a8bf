#include "emulation.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace parl::emulation {

Index3 thread_index{}, block_index{};
Dim3 block_size, grid_size;

namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr std::size_t kSharedBytes = 48 << 10, kMaxSharedBytes = 227 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
    State state = State::kReady;
    // What it waits for, and where.
    const char* waits_for = "";
    Site site{"", 0};
    bool flag = false;
    unsigned mask = 0, source = 0;
    std::uint64_t value = 0;
    // What it has been given.
    std::uint64_t received = 0;
    Votes votes{};
    int count = 0;
};

bool same_place(const Thread& a, const Thread& b) {
    return a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

std::string place(const Thread& thread) {
    return std::string(thread.waits_for) + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
}

std::mt19937_64 random_numbers;
std::map<const void*, std::size_t> allowed_shared_bytes;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Thread> threads;
std::vector<unsigned> ready;  // threads that can run
unsigned current = 0, alive = 0, at_barrier = 0;
std::string error;
std::vector<std::uint64_t> shared_memory;
std::mutex one_launch;

// The memory of this module's thread-local variables, which all static shared ones are, in the host's thread that
// asks; and those of others, pybind11's among them.
struct Range {
    char* begin = nullptr;
    std::size_t size = 0;
};

thread_local char one_local;

Range locals() {
    struct Search {
        const void* module;
        Range found;
    } search{};
    one_local = 1;  // there is none before the first access
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&run), &info);
    search.module = info.dli_fbase;
    dl_iterate_phdr(
        [](dl_phdr_info* module, std::size_t, void* data) {
            auto* const wanted = static_cast<Search*>(data);
            if (reinterpret_cast<const void*>(module->dlpi_addr) != wanted->module) return 0;
            for (int i = 0; i < module->dlpi_phnum; ++i) {
                if (module->dlpi_phdr[i].p_type != PT_TLS) continue;
                wanted->found = {static_cast<char*>(module->dlpi_tls_data), module->dlpi_phdr[i].p_memsz};
            }
            return 1;
        },
        &search);
    return search.found;
}

// Keeps the thread-local variables while kernels use their memory.
class SavedLocals {
  public:
    SavedLocals() : range_(locals()), saved_(range_.begin, range_.begin + range_.size) {}
    ~SavedLocals() { std::copy(saved_.begin(), saved_.end(), range_.begin); }
    SavedLocals(const SavedLocals&) = delete;
    SavedLocals& operator=(const SavedLocals&) = delete;
    void poison() const { std::memset(range_.begin, 0xff, range_.size); }

  private:
    Range range_;
    std::vector<char> saved_;
};

void make_ready(unsigned number) {
    threads[number].state = State::kReady;
    ready.push_back(number);
}

void wait(State state, const char* name, Site site) {
    Thread& self = threads[current];
    self.state = state;
    self.waits_for = name;
    self.site = site;
}

// Lets the block go on if all its threads that have not ended are at the barrier.
void try_block_barrier() {
    if (at_barrier == 0 || at_barrier != alive) return;
    int count = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : threads) {
        if (thread.state != State::kAtBarrier) continue;
        if (first == nullptr) first = &thread;
        if (!same_place(*first, thread)) {
            error =
                "threads of one block wait at different barriers, " + place(*first) + " and " + place(thread);
            return;
        }
        count += thread.flag;
    }
    at_barrier = 0;
    for (unsigned i = 0; i < threads.size(); ++i) {
        if (threads[i].state != State::kAtBarrier) continue;
        threads[i].count = count;
        make_ready(i);
    }
}

// Lets the lanes of `mask` in the warp that begins at thread `first` go on if all that have not ended have come.
void try_warp(unsigned first, unsigned mask) {
    const unsigned size = std::min<unsigned>(kWarp, static_cast<unsigned>(threads.size()) - first);
    unsigned present = 0, yes = 0;
    const Thread* one = nullptr;
    for (unsigned i = 0; i < size; ++i) {
        const Thread& thread = threads[first + i];
        if ((mask >> i & 1) == 0 || thread.state == State::kDone) continue;
        if (thread.state != State::kInWarp) return;
        if (one == nullptr) one = &thread;
        if (thread.mask != mask || !same_place(*one, thread)) {
            error =
                "lanes of one mask are in different warp functions, " + place(*one) + " and " + place(thread);
            return;
        }
        present |= 1u << i;
        yes |= static_cast<unsigned>(thread.flag) << i;
    }
    for (unsigned i = 0; i < size; ++i) {
        if ((present >> i & 1) == 0) continue;
        Thread& thread = threads[first + i];
        const bool came = thread.source < kWarp && (present >> thread.source & 1) != 0;
        thread.received = came ? threads[first + thread.source].value : ~std::uint64_t{0};
        thread.votes = {yes, present};
        make_ready(first + i);
    }
}

void end_thread(unsigned number) {
    threads[number].state = State::kDone;
    --alive;
    try_block_barrier();
    // Lanes may have waited for this one alone.
    const unsigned first = number / kWarp * kWarp;
    const unsigned last = std::min<unsigned>(first + kWarp, static_cast<unsigned>(threads.size()));
    for (unsigned i = first; i < last && error.empty(); ++i) {
        if (threads[i].state == State::kInWarp && (threads[i].mask >> number % kWarp & 1) != 0) {
            try_warp(first, threads[i].mask);
        }
    }
}

std::string who_waits() {
    std::string text = "threads wait for each other for ever:";
    std::map<std::string, std::vector<unsigned>> at;
    for (unsigned i = 0; i < threads.size(); ++i) {
        if (threads[i].state != State::kDone) at[place(threads[i])].push_back(i);
    }
    for (const auto& [where, numbers] : at) {
        text += " " + std::to_string(numbers.size()) + " (the first is " + std::to_string(numbers[0]) +
                ") in " + where + ";";
    }
    return text + " " + std::to_string(threads.size() - alive) + " have ended";
}

void run_block(const std::function<void()>& body, unsigned size) {
    threads.assign(size, Thread{});
    ready.resize(size);
    std::iota(ready.begin(), ready.end(), 0u);
    alive = size;
    at_barrier = 0;
    std::fill(shared_memory.begin(), shared_memory.end(), ~std::uint64_t{0});
    for (unsigned i = 0; i < size; ++i) fibers[i]->start(&body);
    while (error.empty() && !ready.empty()) {
        std::swap(ready[random_numbers() % ready.size()], ready.back());
        current = ready.back();
        ready.pop_back();
        thread_index = {current % block_size.x, current / block_size.x % block_size.y,
                        current / block_size.x / block_size.y};
        fibers[current]->resume();
        if (error.empty() && fibers[current]->done()) end_thread(current);
    }
    if (error.empty() && alive != 0) error = who_waits();
}

void check(const Launch& launch) {
    const auto total = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    const auto limit = allowed_shared_bytes.find(launch.kernel);
    const std::size_t most = limit == allowed_shared_bytes.end() ? kSharedBytes : limit->second;
    std::string reason;
    if (total == 0 || total > kMaxThreads || launch.block.z > 64) {
        reason = "a block of " + std::to_string(total) + " threads, of 1 to 1024";
    } else if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) {
        reason = "an empty grid";
    } else if (launch.grid.x > 0x7fffffffu || launch.grid.y > 0xffffu || launch.grid.z > 0xffffu) {
        reason = "a grid that is too large";
    } else if (launch.shared_bytes > most) {
        reason = std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, of at most " +
                 std::to_string(most);
    }
    if (!reason.empty()) throw std::runtime_error("invalid launch of " + launch.name + ": " + reason);
}

}  // namespace

void set_seed(std::uint64_t seed) { random_numbers.seed(seed); }

void allow_shared_bytes(const void* kernel, std::size_t bytes) {
    if (bytes > kMaxSharedBytes) throw std::runtime_error("a block has at most 227 KiB of shared memory");
    allowed_shared_bytes[kernel] = std::max(bytes, kSharedBytes);
}

void* dynamic_shared_memory() { return shared_memory.data(); }

void run(const Launch& launch, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> guard(one_launch);
    check(launch);
    const unsigned size = launch.block.x * launch.block.y * launch.block.z;
    while (fibers.size() < size) fibers.push_back(std::make_unique<Fiber>());
    shared_memory.assign(launch.shared_bytes / 8 + 1, 0);
    grid_size = launch.grid;
    block_size = launch.block;
    const auto [nx, ny, nz] = launch.grid;
    std::vector<std::uint64_t> order(std::uint64_t{nx} * ny * nz);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::shuffle(order.begin(), order.end(), random_numbers);
    error.clear();
    const SavedLocals saved;
    for (const std::uint64_t b : order) {
        block_index = {static_cast<unsigned>(b % nx), static_cast<unsigned>(b / nx % ny),
                       static_cast<unsigned>(b / nx / ny)};
        saved.poison();
        run_block(body, size);
        if (error.empty()) continue;
        fibers.clear();  // they stand in the middle of the kernel
        throw std::runtime_error(launch.name + ", block (" + std::to_string(block_index.x) + ", " +
                                 std::to_string(block_index.y) + ", " + std::to_string(block_index.z) +
                                 "): " + error);
    }
}

void fail(const std::string& message) {
    error = "thread (" + std::to_string(thread_index.x) + ", " + std::to_string(thread_index.y) + ", " +
            std::to_string(thread_index.z) + "): " + message;
    for (;;) fibers[current]->suspend();
}

unsigned lane() { return current % kWarp; }

int block_barrier(const char* name, bool flag, Site site) {
    wait(State::kAtBarrier, name, site);
    threads[current].flag = flag;
    const unsigned self = current;
    ++at_barrier;
    try_block_barrier();
    fibers[self]->suspend();
    return threads[self].count;
}

namespace {

const Thread& meet(const char* name, unsigned mask, Site site) {
    const unsigned self = current;
    if ((mask >> lane() & 1) == 0)
        fail(std::string(name) + " with a mask that does not name the lane itself");
    wait(State::kInWarp, name, site);
    threads[self].mask = mask;
    try_warp(self / kWarp * kWarp, mask);
    fibers[self]->suspend();
    return threads[self];
}

}  // namespace

std::uint64_t exchange(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site) {
    threads[current].value = value;
    threads[current].source = source;
    return meet(name, mask, site).received;
}

Votes vote(const char* name, unsigned mask, bool flag, Site site) {
    threads[current].flag = flag;
    return meet(name, mask, site).votes;
}

}  // namespace parl::emulation

// Compiled with -fsanitize=alignment, and without its library, the kernels call these two at an access that is not
// aligned as its type demands.
namespace {

struct TypeDescriptor {
    std::uint16_t kind, info;
    char name[1];
};

void report_misaligned(const void* data, std::uintptr_t address) {
    // Laid out by the compiler: a file, a line and a column (32 bits each), then the type.
    struct Layout {
        const char* file;
        std::uint32_t line, column;
        const TypeDescriptor* type;
        unsigned char log_alignment, check;
    };
    const auto* const mismatch = static_cast<const Layout*>(data);
    parl::emulation::fail(std::string("misaligned access to ") + mismatch->type->name + " at " +
                          mismatch->file + ":" + std::to_string(mismatch->line) + ", an address that is " +
                          std::to_string(address % 16) + " modulo 16");
}

}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(const void* data, std::uintptr_t address) {
    report_misaligned(data, address);
}
void __ubsan_handle_type_mismatch_v1_abort(const void* data, std::uintptr_t address) {
    report_misaligned(data, address);
}
}
