#include "block.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>

namespace parl::emulation {
namespace {

constexpr unsigned kWarp = 32;

std::string text_of(Index3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

}  // namespace

void Block::begin(Index3 index, unsigned size, std::size_t shared_bytes, const std::function<void()>* body) {
    index_ = index;
    threads_.assign(size, Thread{});
    ready_.resize(size);
    std::iota(ready_.begin(), ready_.end(), 0u);
    alive_ = size;
    at_barrier_ = 0;
    slept_ = false;
    shared_.assign(shared_bytes / 8 + 1, ~std::uint64_t{0});
    while (fibers_.size() < size) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < size; ++i) fibers_[i]->start(body);
}

bool Block::run_one(std::uint64_t random) {
    if (ready_.empty()) {
        error_ = who_waits();
        return false;
    }
    std::swap(ready_[random % ready_.size()], ready_.back());
    const unsigned number = ready_.back();
    ready_.pop_back();
    current_ = number;
    block_index = index_;
    thread_index = {number % block_size.x, number / block_size.x % block_size.y,
                    number / block_size.x / block_size.y};
    fibers_[number]->resume();
    if (!error_.empty() || !fibers_[number]->done()) return false;
    end(number);
    return true;
}

bool Block::slept() { return std::exchange(slept_, false); }

std::string Block::name() const { return "block " + text_of(index_); }

unsigned Block::lane() const { return current_ % kWarp; }

void Block::fail(const std::string& message) {
    error_ = "thread " + text_of(thread_index) + ": " + message;
    for (;;) fibers_[current_]->suspend();
}

void Block::sleep() {
    slept_ = true;
    make_ready(current_);
    fibers_[current_]->suspend();
}

int Block::barrier(const char* name, bool flag, Site site) {
    Thread& self = wait(State::kAtBarrier, name, site);
    const unsigned number = current_;
    self.flag = flag;
    ++at_barrier_;
    try_barrier();
    fibers_[number]->suspend();
    return self.count;
}

std::uint64_t Block::exchange(const char* name, unsigned mask, std::uint64_t value, unsigned source, Site site) {
    threads_[current_].value = value;
    threads_[current_].source = source;
    return meet(name, mask, site).received;
}

Votes Block::vote(const char* name, unsigned mask, bool flag, Site site) {
    threads_[current_].flag = flag;
    return meet(name, mask, site).votes;
}

bool Block::same_place(const Thread& a, const Thread& b) {
    return a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

std::string Block::place(const Thread& thread) {
    return std::string(thread.waits_for) + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
}

void Block::make_ready(unsigned number) {
    threads_[number].state = State::kReady;
    ready_.push_back(number);
}

Block::Thread& Block::wait(State state, const char* name, Site site) {
    Thread& self = threads_[current_];
    self.state = state;
    self.waits_for = name;
    self.site = site;
    return self;
}

// Lets the block go on if all its threads that have not ended are at the barrier.
void Block::try_barrier() {
    if (at_barrier_ == 0 || at_barrier_ != alive_) return;
    int count = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : threads_) {
        if (thread.state != State::kAtBarrier) continue;
        if (first == nullptr) first = &thread;
        if (!same_place(*first, thread)) {
            error_ = "threads of one block wait at different barriers, " + place(*first) + " and " + place(thread);
            return;
        }
        count += thread.flag;
    }
    at_barrier_ = 0;
    for (unsigned i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state != State::kAtBarrier) continue;
        threads_[i].count = count;
        make_ready(i);
    }
}

// Lets the lanes of `mask` in the warp that begins at thread `first` go on if all that have not ended have come.
void Block::try_warp(unsigned first, unsigned mask) {
    const unsigned size = std::min<unsigned>(kWarp, static_cast<unsigned>(threads_.size()) - first);
    unsigned present = 0, yes = 0;
    const Thread* one = nullptr;
    for (unsigned i = 0; i < size; ++i) {
        const Thread& thread = threads_[first + i];
        if ((mask >> i & 1) == 0 || thread.state == State::kDone) continue;
        if (thread.state != State::kInWarp) return;
        if (one == nullptr) one = &thread;
        if (thread.mask != mask || !same_place(*one, thread)) {
            error_ = "lanes of one mask are in different warp functions, " + place(*one) + " and " + place(thread);
            return;
        }
        present |= 1u << i;
        yes |= static_cast<unsigned>(thread.flag) << i;
    }
    for (unsigned i = 0; i < size; ++i) {
        if ((present >> i & 1) == 0) continue;
        Thread& thread = threads_[first + i];
        const bool came = thread.source < kWarp && (present >> thread.source & 1) != 0;
        thread.received = came ? threads_[first + thread.source].value : ~std::uint64_t{0};
        thread.votes = {yes, present};
        make_ready(first + i);
    }
}

const Block::Thread& Block::meet(const char* name, unsigned mask, Site site) {
    if ((mask >> lane() & 1) == 0) fail(std::string(name) + " with a mask that does not name the lane itself");
    const unsigned number = current_;
    wait(State::kInWarp, name, site).mask = mask;
    try_warp(number / kWarp * kWarp, mask);
    fibers_[number]->suspend();
    return threads_[number];
}

void Block::end(unsigned number) {
    threads_[number].state = State::kDone;
    --alive_;
    try_barrier();
    // Lanes may have waited for this one alone.
    const unsigned first = number / kWarp * kWarp;
    const unsigned last = std::min<unsigned>(first + kWarp, static_cast<unsigned>(threads_.size()));
    for (unsigned i = first; i < last && error_.empty(); ++i) {
        if (threads_[i].state == State::kInWarp && (threads_[i].mask >> number % kWarp & 1) != 0) {
            try_warp(first, threads_[i].mask);
        }
    }
}

std::string Block::who_waits() const {
    std::map<std::string, std::vector<unsigned>> at;
    for (unsigned i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state != State::kDone) at[place(threads_[i])].push_back(i);
    }
    std::string text = "threads wait for each other for ever:";
    for (const auto& [where, numbers] : at) {
        text += " " + std::to_string(numbers.size()) + " (the first is " + std::to_string(numbers[0]) + ") in " +
                where + ";";
    }
    return text + " " + std::to_string(threads_.size() - alive_) + " have ended";
}

}  // namespace parl::emulation
