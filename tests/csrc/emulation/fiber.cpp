// longjmp goes between stacks here, which the checked version takes for an error.
#undef _FORTIFY_SOURCE
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace parl::emulation {
namespace {

constexpr std::size_t kStack = std::size_t{256} << 10;
constexpr std::size_t kGuard = 4096;  // unreadable, below the stack: an overflow ends the process at once

}  // namespace

Fiber::Fiber() {
    void* const memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    stack_ = static_cast<char*>(memory) + kGuard;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 2,
                static_cast<unsigned>(static_cast<std::uint64_t>(address) >> 32),
                static_cast<unsigned>(address));
}

Fiber::~Fiber() { munmap(static_cast<char*>(stack_) - kGuard, kGuard + kStack); }

void Fiber::enter(unsigned high, unsigned low) {
    const auto address = static_cast<std::uintptr_t>((static_cast<std::uint64_t>(high) << 32) | low);
    auto* const fiber = reinterpret_cast<Fiber*>(address);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->host_stack_, &fiber->host_stack_size_);
#endif
    fiber->run();
}

void Fiber::run() {
    for (;;) {
        (*body_)();
        body_ = nullptr;
        suspend();
    }
}

#if defined(__SANITIZE_ADDRESS__)

void Fiber::resume() {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
    swapcontext(&host_context_, &context_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
    __sanitizer_start_switch_fiber(&fake_stack_, host_stack_, host_stack_size_);
    swapcontext(&context_, &host_context_);
    __sanitizer_finish_switch_fiber(fake_stack_, &host_stack_, &host_stack_size_);
}

#else

void Fiber::resume() {
    if (_setjmp(host_) != 0) return;
    if (entered_) _longjmp(here_, 1);
    entered_ = true;
    setcontext(&context_);
}

void Fiber::suspend() {
    if (_setjmp(here_) == 0) _longjmp(host_, 1);
}

#endif

}  // namespace parl::emulation
