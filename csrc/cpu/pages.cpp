#include "cpu/pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace parl::cpu {

void expect_first_write([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // glibc gives freed memory of up to 32 MiB to the next allocation; larger pieces are mapped anew each
    // time.
    constexpr std::size_t kAlwaysMapped = std::size_t{32} << 20;
    constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
    if (bytes < kAlwaysMapped) return;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t last = (address + bytes) / kHugePage * kHugePage;
    // Advice only: what the kernel answers does not matter.
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
}

}  // namespace parl::cpu
