// Where static shared memory is: `__shared__` makes thread-local variables, which lie in one piece.
#pragma once

#include <cstddef>
#include <vector>

namespace parl::emulation {

// Lends the memory of this module's thread-local variables, in the host's thread that asks, to kernels; the values
// of the module's other ones, pybind11's among them, come back at the end.
class Locals {
  public:
    Locals();
    ~Locals();
    Locals(const Locals&) = delete;
    Locals& operator=(const Locals&) = delete;
    // Every bit set: NaN.
    std::vector<char> poison() const { return std::vector<char>(size_, '\xff'); }
    void load(const std::vector<char>& from) const;
    void save(std::vector<char>& to) const;

  private:
    char* begin_ = nullptr;
    std::size_t size_ = 0;
    std::vector<char> saved_;
};

}  // namespace parl::emulation
