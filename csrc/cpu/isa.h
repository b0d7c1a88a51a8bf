// Kernels are compiled once for each instruction set, in a namespace of its name, and chosen at run time.
//
// A source listed under PARL_ISA_SOURCES in CMakeLists.txt is compiled with PARL_ISA defined as that name;
// what it defines goes into `namespace parl::cpu::PARL_ISA`. Its header declares the functions with
// PARL_IN_EACH_ISA, and callers write PARL_DISPATCH(function(arguments)). Inside such a source nothing of the
// standard library may be instantiated that is not surely inlined: the linker would keep one instruction
// set's copy for all.
#pragma once

namespace parl::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best this machine has, unless `use_isa` said otherwise.
Isa isa();
bool has_isa(Isa isa);
void use_isa(Isa isa);

}  // namespace parl::cpu

#ifdef PARL_X86_ISAS
#define PARL_IN_EACH_ISA(...) \
    namespace portable {      \
    __VA_ARGS__               \
    }                         \
    namespace avx2 {          \
    __VA_ARGS__               \
    }                         \
    namespace avx512 {        \
    __VA_ARGS__               \
    }
#define PARL_DISPATCH(...)                                 \
    [&] {                                                  \
        switch (::parl::cpu::isa()) {                      \
            case ::parl::cpu::Isa::kAvx512:                \
                return ::parl::cpu::avx512::__VA_ARGS__;   \
            case ::parl::cpu::Isa::kAvx2:                  \
                return ::parl::cpu::avx2::__VA_ARGS__;     \
            default:                                       \
                return ::parl::cpu::portable::__VA_ARGS__; \
        }                                                  \
    }()
#else
#define PARL_IN_EACH_ISA(...) \
    namespace portable {      \
    __VA_ARGS__               \
    }
#define PARL_DISPATCH(...) ::parl::cpu::portable::__VA_ARGS__
#endif
