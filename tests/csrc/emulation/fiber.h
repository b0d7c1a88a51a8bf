// A stack of its own that a thread of the host switches to and from.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>
#include <functional>

namespace parl::emulation {

// Runs `body` again and again: each `resume` goes on until the body suspends the fiber, or ends.
class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // From the host's own stack: what the next `resume` begins.
    void start(const std::function<void()>* body) { body_ = body; }
    // From the host's own stack: goes on in the fiber; returns once that has suspended itself or its body has ended.
    void resume();
    // From the fiber.
    void suspend();
    bool done() const { return body_ == nullptr; }

  private:
    static void enter(unsigned high, unsigned low);
    void run();

    const std::function<void()>* body_ = nullptr;
    void* stack_ = nullptr;
    bool entered_ = false;
    ucontext_t context_{}, host_context_{};
    // A switch by setjmp asks nothing of the kernel, unlike one by swapcontext.
    jmp_buf here_{}, host_{};
    // What AddressSanitizer wants to know of stacks.
    void* fake_stack_ = nullptr;
    const void* host_stack_ = nullptr;
    std::size_t host_stack_size_ = 0;
};

}  // namespace parl::emulation
