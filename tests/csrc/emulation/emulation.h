// CUDA's threads on the host, for tests: the same sources as nvcc's, compiled as C++ against the headers here.
//
// A block's threads are fibers of one thread of the host. Each runs until it waits, at a barrier or for its warp;
// then another that can run is drawn by a generator of random numbers, so that a missing barrier shows with some
// seed. Blocks follow one another, in a random order as well, or some of them take turns (set_resident_blocks) at
// moments drawn likewise and where their threads sleep (__nanosleep), waiting for other blocks. Reported as errors, with the places in the source:
// threads that wait for each other for ever, barriers and warp functions that threads of a block or a warp meet at
// different places, threads that sleep for ever, accesses that are not aligned as their type demands, launches that CUDA would refuse. Shared memory
// is NaN in the beginning of each block.
//
// What this does not show:
// - the order in which other blocks, or threads that do not meet at a barrier, see writes to memory: here every
//   write is seen at once. A missing __threadfence() goes unnoticed;
// - races within a stretch of code without barrier, warp function or sleep: a thread is never interrupted there;
// - streams, which are all in order here, captured graphs, and anything of time and resources: registers,
//   occupancy, coalescing, bank conflicts;
// - last digits: multiply-adds are not fused here, and functions of the GPU's library differ from the host's.
// Addresses out of bounds show in a build with PARL_SANITIZE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace parl::emulation {

// A place in the source: as a default argument, that of the call.
struct Site {
    const char* file = __builtin_FILE();
    int line = __builtin_LINE();
};

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Index3 {
    unsigned x, y, z;
};

// Of the thread that runs.
extern Index3 thread_index, block_index;
extern Dim3 block_size, grid_size;

struct Launch {
    Dim3 grid, block;
    std::size_t shared_bytes;
    const void* kernel;
    std::string name;
};

// Runs `body` in every thread of the grid. std::runtime_error on a launch that CUDA would refuse, and on what a
// thread did wrong.
void run(const Launch& launch, const std::function<void()>& body);

// What the driver and the GPU say of themselves: the newest CUDA that the driver knows, and the compute capability.
struct Machine {
    int driver = 13000, capability = 90;
};
extern Machine machine;

// From where the order of threads and blocks is drawn.
void set_seed(std::uint64_t seed);

// How many blocks take turns, 1 in the beginning.
void set_resident_blocks(unsigned count);

// How much dynamic shared memory `kernel` may ask for beyond the usual 48 KiB. It is an error to lower that,
// since another thread may be about to launch with more.
void allow_shared_bytes(const void* kernel, std::size_t bytes);

void* dynamic_shared_memory();

// From a thread: stops the launch, with the message.
[[noreturn]] void fail(const std::string& message);

// From a thread: lets others, of other blocks too, go first.
void sleep();

// Waits for the threads of the block that have not ended, and counts those that came with `flag`.
int block_barrier(const char* name, bool flag, Site site);

// Waits for the lanes of `mask` that have not ended, and takes the value of lane `source`; of one that did not
// take part, all bits are set.
std::uint64_t exchange(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site);

// Waits likewise; which of the lanes came with `flag`, and which came at all.
struct Votes {
    unsigned yes, all;
};
Votes vote(const char* name, unsigned mask, bool flag, Site site);

// Of the thread that runs, in its warp.
unsigned lane();

}  // namespace parl::emulation
