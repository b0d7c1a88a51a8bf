// Memory of kernels that are compiled for each instruction set, which may not use std::vector (isa.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace parl::cpu {

// Aligned to a cache line; freed by free_aligned. Throws std::bad_alloc.
void* allocate_aligned(std::size_t bytes);
void free_aligned(void* memory) noexcept;

}  // namespace parl::cpu

#ifdef PARL_ISA
#include "math/inline.h"

namespace parl::cpu::PARL_ISA {

// An array of a trivial type, not initialised.
template <typename T>
class Buffer {
  public:
    PARL_INLINE Buffer() = default;
    PARL_INLINE explicit Buffer(std::int64_t size)
        : data_(size > 0 ? static_cast<T*>(allocate_aligned(static_cast<std::size_t>(size) * sizeof(T)))
                         : nullptr),
          size_(size) {}
    PARL_INLINE ~Buffer() { free_aligned(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Holds at least `size` elements from now on; what it held is lost if that takes new memory.
    PARL_INLINE void reserve(std::int64_t size) {
        if (size <= size_) return;
        free_aligned(data_);
        data_ = nullptr;
        size_ = 0;
        data_ = static_cast<T*>(allocate_aligned(static_cast<std::size_t>(size) * sizeof(T)));
        size_ = size;
    }

    PARL_INLINE T* get() const { return data_; }
    PARL_INLINE T& operator[](std::int64_t i) const { return data_[i]; }

  private:
    T* data_ = nullptr;
    std::int64_t size_ = 0;
};

}  // namespace parl::cpu::PARL_ISA
#endif
