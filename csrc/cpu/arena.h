// Memory given out piece by piece, each beginning at a cache line.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace parl::cpu {

// Without memory it counts what would be taken, and its pieces are null.
template <typename T>
struct Arena {
    T* base;
    std::int64_t used = 0;

    PARL_INLINE T* take(std::int64_t count) {
        constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
        T* const piece = base == nullptr ? nullptr : base + used;
        used += (count + kLine - 1) / kLine * kLine;
        return piece;
    }
};

}  // namespace parl::cpu
