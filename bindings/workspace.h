// Memory that a kernel works in, kept from call to call.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/isa.h"

namespace parl::bindings {

// Aligned to a cache line; zero whenever what it is laid out for has changed.
template <typename T>
class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { release(); }

    // `shape`: all numbers that the layout follows from, apart from the instruction set.
    T* resize(std::int64_t size, const std::vector<std::int64_t>& shape) {
        if (size == size_ && shape == shape_ && isa_ == cpu::isa()) return data_;
        if (size != size_) {
            release();
            data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), kAlignment));
            size_ = size;
        }
        shape_ = shape;
        isa_ = cpu::isa();
        std::memset(data_, 0, static_cast<std::size_t>(size_) * sizeof(T));
        return data_;
    }

  private:
    static constexpr std::align_val_t kAlignment{64};

    void release() {
        if (data_ != nullptr) ::operator delete(data_, kAlignment);
        data_ = nullptr;
        size_ = 0;
    }

    T* data_ = nullptr;
    std::int64_t size_ = 0;
    std::vector<std::int64_t> shape_;
    cpu::Isa isa_{};
};

}  // namespace parl::bindings
