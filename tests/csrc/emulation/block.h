// The threads of one block, and who of them waits for whom.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace parl::emulation {

class Block {
  public:
    // Begins block `index` with `size` threads, each about to run `body`; what it reads of shared memory is NaN.
    void begin(Index3 index, unsigned size, std::size_t shared_bytes, const std::function<void()>* body);
    // Runs one of the threads that can until it waits, sleeps or ends; `random` draws it. True if it ended.
    bool run_one(std::uint64_t random);
    bool done() const { return alive_ == 0; }
    // Whether a thread has slept since the last question.
    bool slept();
    // What went wrong, if anything did; then the block cannot go on.
    const std::string& error() const { return error_; }
    std::string name() const;

    Index3 index() const { return index_; }
    void* shared_memory() { return shared_.data(); }
    std::vector<char>& locals() { return locals_; }

    // From the thread that runs.
    unsigned lane() const;
    [[noreturn]] void fail(const std::string& message);
    void sleep();
    int barrier(const char* name, bool flag, Site site);
    std::uint64_t exchange(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site);
    Votes vote(const char* name, unsigned mask, bool flag, Site site);

  private:
    enum class State { kReady, kAtBarrier, kInWarp, kDone };

    struct Thread {
        State state = State::kReady;
        // What it waits for, and where.
        const char* waits_for = "";
        Site site{"", 0};
        bool flag = false;
        unsigned mask = 0, source = 0;
        std::uint64_t value = 0;
        // What it has been given.
        std::uint64_t received = 0;
        Votes votes{};
        int count = 0;
    };

    static bool same_place(const Thread& a, const Thread& b);
    static std::string place(const Thread& thread);
    void make_ready(unsigned number);
    Thread& wait(State state, const char* name, Site site);
    void try_barrier();
    void try_warp(unsigned first, unsigned mask);
    const Thread& meet(const char* name, unsigned mask, Site site);
    void end(unsigned number);
    std::string who_waits() const;

    Index3 index_{};
    std::vector<Thread> threads_;
    std::vector<unsigned> ready_;  // threads that can run
    std::vector<std::unique_ptr<Fiber>> fibers_;
    unsigned current_ = 0, alive_ = 0, at_barrier_ = 0;
    bool slept_ = false;
    std::string error_;
    std::vector<std::uint64_t> shared_;
    std::vector<char> locals_;  // the static shared memory while other blocks run
};

}  // namespace parl::emulation
