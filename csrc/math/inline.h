// How the per-element maths is compiled: for the host and the device, and always inlined, since the same
// template is compiled for several instruction sets and the linker must never pick one of them for all.
#pragma once

#ifdef __CUDACC__
#define PARL_INLINE __host__ __device__ __forceinline__
#else
#define PARL_INLINE inline __attribute__((always_inline))
#endif
