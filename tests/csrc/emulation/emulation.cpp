#include "emulation.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "block.h"
#include "locals.h"

namespace parl::emulation {

Index3 thread_index{}, block_index{};
Dim3 block_size, grid_size;
Machine machine;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kSharedBytes = 48 << 10, kMaxSharedBytes = 227 << 10;
// So often threads sleep and none ends only if they wait for what does not come.
constexpr int kMaxSleeps = 1'000'000;

std::mt19937_64 random_numbers;
std::map<const void*, std::size_t> allowed_shared_bytes;
unsigned resident_blocks = 1;
std::vector<Block> blocks;
Block* running = nullptr;
std::mutex one_launch;

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

// The blocks of a grid, in random order.
class Grid {
  public:
    Grid(const Launch& launch, const std::function<void()>& body) : launch_(launch), body_(body) {
        order_.resize(std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
        std::iota(order_.begin(), order_.end(), std::uint64_t{0});
        std::shuffle(order_.begin(), order_.end(), random_numbers);
        blocks.resize(std::min<std::size_t>(resident_blocks, order_.size()));
    }

    void run() {
        for (Block& block : blocks) {
            begin_next(block);
            active_.push_back(&block);
        }
        while (!active_.empty()) {
            std::swap(active_[random_numbers() % active_.size()], active_.back());
            if (!run_for_a_while(*active_.back())) active_.pop_back();
        }
    }

  private:
    void begin_next(Block& block) {
        const std::uint64_t b = order_.back();
        order_.pop_back();
        const auto [nx, ny, nz] = launch_.grid;
        const Index3 index{static_cast<unsigned>(b % nx), static_cast<unsigned>(b / nx % ny),
                           static_cast<unsigned>(b / nx / ny)};
        block.begin(index, launch_.block.x * launch_.block.y * launch_.block.z, launch_.shared_bytes, &body_);
        block.locals() = locals_.poison();
    }

    // Until the block has ended, or waits for others, or a stretch of random length is over. False if no block is
    // left to take its place.
    bool run_for_a_while(Block& block) {
        running = &block;
        locals_.load(block.locals());
        const bool alone = active_.size() == 1;
        for (std::uint64_t left = 1 + random_numbers() % 256; alone || left > 0; --left) {
            sleeps_ = block.run_one(random_numbers()) ? 0 : sleeps_;
            if (!block.error().empty()) throw std::runtime_error(block.name() + ": " + block.error());
            if (block.done()) {
                if (order_.empty()) return false;
                begin_next(block);
                return true;
            }
            if (!block.slept()) continue;
            if (++sleeps_ > kMaxSleeps) {
                throw std::runtime_error(block.name() +
                                         ": threads sleep, and what they wait for does not come");
            }
            if (!alone) break;
        }
        if (!alone) locals_.save(block.locals());
        return true;
    }

    const Launch& launch_;
    const std::function<void()>& body_;
    const Locals locals_;
    std::vector<std::uint64_t> order_;
    std::vector<Block*> active_;
    int sleeps_ = 0;
};

}  // namespace

void set_seed(std::uint64_t seed) { random_numbers.seed(seed); }

void set_resident_blocks(unsigned count) { resident_blocks = std::max(count, 1u); }

void allow_shared_bytes(const void* kernel, std::size_t bytes) {
    if (bytes > kMaxSharedBytes) throw std::runtime_error("a block has at most 227 KiB of shared memory");
    std::size_t& allowed = allowed_shared_bytes[kernel];
    if (bytes < allowed) throw std::runtime_error("the limit of a kernel's shared memory is lowered");
    allowed = std::max(bytes, kSharedBytes);
}

void run(const Launch& launch, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> guard(one_launch);
    check(launch);
    grid_size = launch.grid;
    block_size = launch.block;
    try {
        Grid(launch, body).run();
    } catch (const std::runtime_error& error) {
        blocks.clear();  // their threads stand in the middle of the kernel
        throw std::runtime_error(launch.name + ", " + error.what());
    }
}

void* dynamic_shared_memory() { return running->shared_memory(); }
void fail(const std::string& message) { running->fail(message); }
void sleep() { running->sleep(); }
unsigned lane() { return running->lane(); }
int block_barrier(const char* name, bool flag, Site site) { return running->barrier(name, flag, site); }
std::uint64_t exchange(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site) {
    return running->exchange(name, mask, value, source, site);
}
Votes vote(const char* name, unsigned mask, bool flag, Site site) {
    return running->vote(name, mask, flag, site);
}

}  // namespace parl::emulation
