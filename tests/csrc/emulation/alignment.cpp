// What kernels, compiled with -fsanitize=alignment and without its library, call at an access that is not aligned as
// its type demands.
#include <cstdint>
#include <string>

#include "emulation.h"

namespace {

struct TypeDescriptor {
    std::uint16_t kind, info;
    char name[1];
};

// As the compiler lays it out.
struct Mismatch {
    const char* file;
    std::uint32_t line, column;
    const TypeDescriptor* type;
    unsigned char log_alignment, check;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const void* data, std::uintptr_t address) {
    const auto& mismatch = *static_cast<const Mismatch*>(data);
    parl::emulation::fail(std::string("misaligned access to ") + mismatch.type->name + " at " + mismatch.file + ":" +
                          std::to_string(mismatch.line) + ", an address that is " + std::to_string(address % 16) +
                          " modulo 16");
}
