// Memory that is about to be written for the first time.
#pragma once

#include <cstddef>

namespace parl::cpu {

// Asks for huge pages where data[0:bytes] is so large that the allocator has mapped it just now: the kernel
// then hands it out in pieces of 2 MiB instead of 4 KiB, each of which costs a page fault. Without effect
// where there are none.
void expect_first_write(void* data, std::size_t bytes);

}  // namespace parl::cpu
