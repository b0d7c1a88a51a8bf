#include "cpu/isa.h"

#include <atomic>

namespace parl::cpu {
namespace {

Isa best() {
    if (has_isa(Isa::kAvx512)) return Isa::kAvx512;
    return has_isa(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

std::atomic<Isa>& in_use() {
    static std::atomic<Isa> chosen{best()};
    return chosen;
}

}  // namespace

bool has_isa(Isa isa) {
#ifdef PARL_X86_ISAS
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx2) return avx2;
    if (isa == Isa::kAvx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return isa == Isa::kPortable;
}

Isa isa() { return in_use().load(std::memory_order_relaxed); }

void use_isa(Isa isa) { in_use().store(isa, std::memory_order_relaxed); }

}  // namespace parl::cpu
