#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace parl::cpu {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // NumPy advises from this size on, too.
    constexpr std::int64_t kLarge = std::int64_t{1} << 22;
    constexpr std::uintptr_t kPage = 4096;
    if (bytes < kLarge) return;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const auto end =
        (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace parl::cpu
