#include <cuda_runtime.h>

#include "cuda/launch.h"
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

}  // namespace

void bind_examples(py::module_& module) {
    py::module_ examples = module.def_submodule("examples", "Kernels by which the emulation is tested.");
    examples.def("reverse_blocks", &reverse_blocks);
    examples.def("shuffle_lanes", &shuffle_lanes);
    examples.def("votes", &votes);
    examples.def("divergent", &divergent);
    examples.def("fourth_of_four", &fourth_of_four);
    examples.def("launch_with", &launch_with);
}

}  // namespace parl::emulation
