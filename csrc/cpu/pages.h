// Memory that an operation is the first to write.
#pragma once

#include <cstdint>

namespace parl::cpu {

// Asks for huge pages where `data` is large and still unmapped: with the usual ones, a large output that was
// just allocated costs several times more in page faults than in arithmetic. Only advice; without effect on
// memory that has been written before, and on systems that know none.
void prefer_huge_pages(void* data, std::int64_t bytes);

}  // namespace parl::cpu
