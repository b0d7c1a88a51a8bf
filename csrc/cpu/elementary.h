// exp, log and their kin over arrays, in each instruction set: how math/elementary.h is tested.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

enum class Elementary { kExp, kExpm1, kLog, kLog1p, kTanh, kSigmoid, kSoftplus };

// values, out: (count,).
PARL_IN_EACH_ISA(template <typename T>
                 void elementary(Elementary function, const T* values, std::int64_t count, T* out);)

}  // namespace parl::cpu
