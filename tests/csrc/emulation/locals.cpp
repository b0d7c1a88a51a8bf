#include "locals.h"

#include <algorithm>

#include <dlfcn.h>
#include <link.h>

namespace parl::emulation {
namespace {

thread_local char one_local;

struct Search {
    const void* module;
    char* begin;
    std::size_t size;
};

int look_at(dl_phdr_info* module, std::size_t, void* data) {
    auto* const search = static_cast<Search*>(data);
    if (reinterpret_cast<const void*>(module->dlpi_addr) != search->module) return 0;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        if (module->dlpi_phdr[i].p_type != PT_TLS) continue;
        search->begin = static_cast<char*>(module->dlpi_tls_data);
        search->size = module->dlpi_phdr[i].p_memsz;
    }
    return 1;
}

}  // namespace

Locals::Locals() {
    one_local = 1;  // the memory is there from the first access on
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&look_at), &info);
    Search search{info.dli_fbase, nullptr, 0};
    dl_iterate_phdr(&look_at, &search);
    begin_ = search.begin;
    size_ = search.size;
    save(saved_);
}

Locals::~Locals() { load(saved_); }

void Locals::load(const std::vector<char>& from) const { std::copy(from.begin(), from.end(), begin_); }

void Locals::save(std::vector<char>& to) const { to.assign(begin_, begin_ + size_); }

}  // namespace parl::emulation
