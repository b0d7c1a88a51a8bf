// The recurrence of the segmented scan, one element at a time.
#pragma once

namespace parl::math {

// y_h = x_h + discount * y_{h-1} (or y_{h+1}, when the scan runs backwards). constexpr, so that host and
// device code can share it.
template <typename T>
constexpr T scan_step(T value, T carry, T discount) {
    return value + discount * carry;
}

}  // namespace parl::math
