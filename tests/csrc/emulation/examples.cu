#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/scan_carry.cuh"
#include "examples.h"

namespace parl::emulation {
namespace {

namespace py = pybind11;
using cuda::launch;

template <bool kBarrier>
__global__ void reverse_block(const int* values, int* out) {
    __shared__ int shared[1024];
    const unsigned i = threadIdx.x;
    shared[i] = values[blockIdx.x * blockDim.x + i];
    if (kBarrier) __syncthreads();
    out[blockIdx.x * blockDim.x + i] = shared[blockDim.x - 1 - i];
}

void reverse_blocks(std::uintptr_t values, std::uintptr_t out, unsigned blocks, unsigned threads,
                    bool barrier) {
    launch(barrier ? &reverse_block<true> : &reverse_block<false>, dim3(blocks), dim3(threads), 0, nullptr,
           reinterpret_cast<const int*>(values), reinterpret_cast<int*>(out));
}

enum Shuffle { kIndexed, kUp, kDown, kXor };

__global__ void shuffle_kernel(int kind, int argument, int width, unsigned mask, int* out) {
    const int i = static_cast<int>(threadIdx.x);
    if ((mask >> i & 1) == 0) return;
    int got = 0;
    if (kind == kIndexed) got = __shfl_sync(mask, i, argument, width);
    if (kind == kUp) got = __shfl_up_sync(mask, i, static_cast<unsigned>(argument), width);
    if (kind == kDown) got = __shfl_down_sync(mask, i, static_cast<unsigned>(argument), width);
    if (kind == kXor) got = __shfl_xor_sync(mask, i, argument, width);
    out[i] = got;
}

void shuffle_lanes(int kind, int argument, int width, unsigned mask, std::uintptr_t out) {
    launch(&shuffle_kernel, dim3(1), dim3(32), 0, nullptr, kind, argument, width, mask,
           reinterpret_cast<int*>(out));
}

// Per thread: any, all, ballot of its warp; or, and, count of the block, of whether `flags` is not 0.
__global__ void vote_kernel(const int* flags, int* out) {
    const int flag = flags[threadIdx.x];
    int* const mine = out + 6 * threadIdx.x;
    mine[0] = __any_sync(cuda::kAllLanes, flag);
    mine[1] = __all_sync(cuda::kAllLanes, flag);
    mine[2] = static_cast<int>(__ballot_sync(cuda::kAllLanes, flag));
    mine[3] = __syncthreads_or(flag);
    mine[4] = __syncthreads_and(flag);
    mine[5] = __syncthreads_count(flag);
}

void votes(std::uintptr_t flags, std::uintptr_t out, unsigned threads) {
    launch(&vote_kernel, dim3(1), dim3(threads), 0, nullptr, reinterpret_cast<const int*>(flags),
           reinterpret_cast<int*>(out));
}

__global__ void half_waits_elsewhere() {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

__global__ void two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void two_shuffles() {
    if (threadIdx.x == 0) {
        __shfl_sync(cuda::kAllLanes, 1, 0);
    } else {
        __shfl_sync(cuda::kAllLanes, 2, 0);
    }
}

__global__ void mask_without_itself() { __shfl_sync(1u, 1, 0); }

// Threads that have ended are not waited for.
__global__ void some_end_early() {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    __syncwarp();
}

void divergent(const std::string& which) {
    const dim3 one(1), two_warps(64);
    if (which == "barrier and warp") return launch(&half_waits_elsewhere, one, two_warps, 0, nullptr);
    if (which == "two barriers") return launch(&two_barriers, one, two_warps, 0, nullptr);
    if (which == "two shuffles") return launch(&two_shuffles, one, two_warps, 0, nullptr);
    if (which == "mask without itself") return launch(&mask_without_itself, one, two_warps, 0, nullptr);
    if (which == "early end") return launch(&some_end_early, one, two_warps, 0, nullptr);
    throw py::value_error("no example called " + which);
}

__global__ void read_quad(const float* values, float* out) {
    *out = reinterpret_cast<const float4*>(values)->w;
}

void fourth_of_four(std::uintptr_t values, std::uintptr_t out) {
    launch(&read_quad, dim3(1), dim3(1), 0, nullptr, reinterpret_cast<const float*>(values),
           reinterpret_cast<float*>(out));
}

__global__ void first_of_shared(float* out) { *out = *cuda::dynamic_shared<float>(); }

void launch_with(unsigned blocks, unsigned threads, std::size_t shared_bytes, std::uintptr_t out) {
    launch(&first_of_shared, dim3(blocks), dim3(threads), shared_bytes, nullptr,
           reinterpret_cast<float*>(out));
}

// Each block's sum includes that of the block before, which it waits for.
__global__ void chain(unsigned* ticket, const int* values, int* sums, int* flags) {
    const unsigned mine = atomicAdd(ticket, 1u);
    int before = 0;
    if (mine > 0) {
        while (*static_cast<volatile int*>(flags + mine - 1) == 0) __nanosleep(20);
        before = sums[mine - 1];
    }
    __nanosleep(20);
    sums[mine] = before + values[mine];
    __threadfence();
    flags[mine] = 1;
}

void sum_by_chain(std::uintptr_t ticket, std::uintptr_t values, std::uintptr_t sums, std::uintptr_t flags,
                  unsigned blocks) {
    launch(&chain, dim3(blocks), dim3(1), 0, nullptr, reinterpret_cast<unsigned*>(ticket),
           reinterpret_cast<const int*>(values), reinterpret_cast<int*>(sums), reinterpret_cast<int*>(flags));
}

// Sums over blocks that take turns, of a static and a dynamic array each.
__global__ void sum_of_shared(int* out) {
    __shared__ int fixed[32];
    int* const dynamic = cuda::dynamic_shared<int>();
    fixed[threadIdx.x] = dynamic[threadIdx.x] = static_cast<int>(blockIdx.x);
    for (int i = 0; i < 3; ++i) __nanosleep(20);
    __syncthreads();
    const unsigned other = (threadIdx.x + 1) % 32;
    out[32 * blockIdx.x + threadIdx.x] = fixed[other] + dynamic[other];
}

void sums_of_shared(std::uintptr_t out, unsigned blocks) {
    launch(&sum_of_shared, dim3(blocks), dim3(32), 32 * sizeof(int), nullptr, reinterpret_cast<int*>(out));
}

// What each tile of one warp gets of the tiles before it; see scan_carry.cuh.
__global__ void carries(cuda::TileStates states, const double* a, const double* b, const int* resets, double* out) {
    const int lane = static_cast<int>(threadIdx.x);
    unsigned tile = lane == 0 ? atomicAdd(states.ticket, 1u) : 0;
    tile = __shfl_sync(cuda::kAllLanes, tile, 0);
    const cuda::Affine own{a[tile], b[tile], resets[tile] != 0};
    const double y = cuda::carry_into(states, tile, own, lane);
    if (lane == 0) out[tile] = y;
}

// `flags` (2 · tiles + 4,), zeros, and `maps` (3 · tiles,) of pairs are the states' memory.
void carries_of_tiles(std::uintptr_t flags_address, std::uintptr_t maps_address, std::uintptr_t a, std::uintptr_t b,
                      std::uintptr_t resets, std::uintptr_t out, unsigned tiles) {
    auto* const flags = reinterpret_cast<int*>(flags_address);
    auto* const maps = reinterpret_cast<double2*>(maps_address);
    const unsigned groups = (tiles + 31) / 32;
    const cuda::TileStates states{reinterpret_cast<unsigned*>(flags),
                                  flags + 1,
                                  flags + 1 + tiles,
                                  flags + 1 + tiles + groups,
                                  maps,
                                  maps + tiles,
                                  reinterpret_cast<double*>(maps + tiles + groups)};
    launch(&carries, dim3(tiles), dim3(32), 0, nullptr, states, reinterpret_cast<const double*>(a),
           reinterpret_cast<const double*>(b), reinterpret_cast<const int*>(resets), reinterpret_cast<double*>(out));
}

}  // namespace

void bind_examples(py::module_& module) {
    py::module_ examples = module.def_submodule("examples", "Kernels by which the emulation is tested.");
    examples.def("reverse_blocks", &reverse_blocks);
    examples.def("shuffle_lanes", &shuffle_lanes);
    examples.def("votes", &votes);
    examples.def("divergent", &divergent);
    examples.def("fourth_of_four", &fourth_of_four);
    examples.def("sum_by_chain", &sum_by_chain);
    examples.def("sums_of_shared", &sums_of_shared);
    examples.def("carries_of_tiles", &carries_of_tiles);
    examples.def("launch_with", &launch_with);
}

}  // namespace parl::emulation
