#include "cpu/buffer.h"

#include <new>

namespace parl::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void* allocate_aligned(std::size_t bytes) { return ::operator new(bytes, kAlignment); }

void free_aligned(void* memory) noexcept { ::operator delete(memory, kAlignment); }

}  // namespace parl::cpu
