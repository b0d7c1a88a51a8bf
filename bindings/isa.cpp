#include "cpu/isa.h"

#include <pybind11/pybind11.h>

#include <array>
#include <string>

namespace parl::bindings {
namespace {

namespace py = pybind11;

struct Named {
    const char* name;
    cpu::Isa isa;
};
constexpr std::array<Named, 3> kIsas{
    {{"portable", cpu::Isa::kPortable}, {"avx2", cpu::Isa::kAvx2}, {"avx512", cpu::Isa::kAvx512}}};

const char* isa() {
    for (const Named& named : kIsas) {
        if (named.isa == cpu::isa()) return named.name;
    }
    return "";
}

py::list isas() {
    py::list names;
    for (const Named& named : kIsas) {
        if (cpu::has_isa(named.isa)) names.append(named.name);
    }
    return names;
}

void use_isa(const std::string& name) {
    for (const Named& named : kIsas) {
        if (name != named.name) continue;
        if (!cpu::has_isa(named.isa)) throw py::value_error("this machine has no " + name);
        return cpu::use_isa(named.isa);
    }
    throw py::value_error("name must be portable, avx2 or avx512, got '" + name + "'");
}

}  // namespace

void bind_isa(py::module_& module) {
    module.def("isa", &isa, "The instruction set that kernels are run in.");
    module.def("isas", &isas, "Those that this machine has, the best last.");
    module.def("use_isa", &use_isa, py::arg("name"),
               "Run kernels in another one, for tests and comparisons.");
}

}  // namespace parl::bindings
