// Parts of one piece of memory that the caller gives. From null on it only counts.
#pragma once

#include <cstdint>

namespace parl::cuda {

template <typename T>
class Arena {
  public:
    explicit Arena(T* memory) : memory_(memory) {}

    // `size` elements, at a multiple of 256 bytes from the start, as wide loads want it.
    T* take(std::int64_t size) {
        T* const taken = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += (size + kLine - 1) / kLine * kLine;
        return taken;
    }
    std::int64_t used() const { return used_; }

  private:
    static constexpr std::int64_t kLine = 256 / static_cast<std::int64_t>(sizeof(T));

    T* memory_;
    std::int64_t used_ = 0;
};

}  // namespace parl::cuda
