#include "cpu/conjugate_gradients.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/buffer.h"
#include "cpu/krylov.h"
#include "math/conjugate_gradients.h"

namespace parl::cpu {
namespace {

// Below this many elements a thread costs more to wake than it saves.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 16;

CurvatureSums operator+(CurvatureSums a, CurvatureSums b) {
    return {a.curvature + b.curvature, a.direction + b.direction, a.image + b.image};
}

ResidualSums operator+(ResidualSums a, ResidualSums b) { return {a.residual + b.residual, a.x + b.x}; }

// Of sums over fixed parts of a vector, one to a thread, in order.
template <typename Sweep>
auto sum_of_parts(std::int64_t size, int num_threads, const Sweep& sweep) {
    const int parts = size < kParallelElements ? 1 : num_threads;
    std::vector<decltype(sweep(std::int64_t{0}, size))> sums(static_cast<std::size_t>(parts));
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        sums[static_cast<std::size_t>(part)] = sweep(size * part / parts, size * (part + 1) / parts);
    }
    auto total = sums[0];
    for (std::size_t part = 1; part < sums.size(); ++part) total = total + sums[part];
    return total;
}

template <typename T>
T root(double square) {
    return static_cast<T>(std::sqrt(square));
}

// The vectors of one solve and the recurrence; what is compared is rounded to T, as a tensor would be.
template <typename T>
class Recurrence {
  public:
    Recurrence(const ShiftedSystem<T>& system, const T* residual, T* x, int num_threads)
        : system_(system), x_(x), num_threads_(num_threads) {
        const std::int64_t size = system.size;
        memory_.reset(static_cast<T*>(allocate_aligned(static_cast<std::size_t>(3 * size + 1) * sizeof(T))));
        r_ = memory_.get();
        p_ = r_ + size;
        image_ = p_ + size;
        start(residual,
              sum([&](auto begin, auto end) { return PARL_DISPATCH(square_sweep(residual, begin, end)); }));
    }

    void step() {
        multiply(p_);
        const CurvatureSums sums = sum([&](auto begin, auto end) {
            return PARL_DISPATCH(curvature_sweep(p_, system_.damping, image_, begin, end));
        });
        const T curvature = static_cast<T>(sums.curvature);
        const T growth = root<T>(sums.image) / root<T>(sums.direction);
        if (!(growth <= operator_norm)) operator_norm = growth;  // a NaN too
        const T negligible = math::negligible_curvature(operator_norm, static_cast<T>(sums.direction));
        halted = std::abs(curvature) <= negligible;
        if (halted) return;
        negative = negative || curvature < -negligible;
        const T length = square_ / curvature;
        const double square = sum([&](auto begin, auto end) {
            return PARL_DISPATCH(step_sweep(length, p_, image_, x_, r_, begin, end));
        });
        const T ratio = static_cast<T>(square) / square_;
        square_ = static_cast<T>(square);
        norm = root<T>(square);
        sum([&](auto begin, auto end) {
            PARL_DISPATCH(direction_sweep(r_, ratio, p_, begin, end));
            return 0;
        });
    }

    // Puts the true residual's norm in place of the recurrence's; true if the two disagree materially, and
    // the recurrence has started again.
    bool check(T rtol) {
        multiply(x_);
        const ResidualSums sums = sum([&](auto begin, auto end) {
            return PARL_DISPATCH(residual_sweep(system_.rhs, x_, system_.damping, image_, begin, end));
        });
        const T claimed = norm;
        norm = root<T>(sums.residual);
        x_norm_ = root<T>(sums.x);
        if (!math::has_parted(norm, claimed, rtol)) return false;
        start(image_, sums.residual);
        return true;
    }

    // Whether the residual is what rounding of A x leaves, for the x that was checked last.
    bool is_rounding(double rtol) const { return math::is_rounding(norm, operator_norm, x_norm_, rtol); }

    T norm = T(0);  // ‖rhs − A x‖, true or as the recurrence has it
    T operator_norm = T(0);
    bool negative = false, halted = false;
    std::int64_t products = 0;

  private:
    struct Free {
        void operator()(T* memory) const noexcept { free_aligned(memory); }
    };

    template <typename Sweep>
    auto sum(const Sweep& sweep) const {
        return sum_of_parts(system_.size, num_threads_, sweep);
    }

    void start(const T* residual, double square) {
        std::copy(residual, residual + system_.size, r_);
        std::copy(residual, residual + system_.size, p_);
        square_ = static_cast<T>(square);
        norm = root<T>(square);
    }

    // image_ = A v, but for the damping.
    void multiply(const T* v) {
        system_.product->apply(v, image_, nullptr, num_threads_);
        ++products;
    }

    const ShiftedSystem<T> system_;
    T* const x_;
    const int num_threads_;
    std::unique_ptr<T[], Free> memory_;
    T *r_, *p_, *image_;
    T square_ = T(0);  // r·r
    T x_norm_ = T(0);
};

}  // namespace

template <typename T>
SolveEnd<T> conjugate_gradients(const ShiftedSystem<T>& system, const StoppingRule& rule, const T* residual,
                                T* x, int num_threads, const std::function<void()>& between) {
    const T rtol = static_cast<T>(rule.rtol);
    Recurrence<T> state(system, residual, x, num_threads);
    SolveEnd<T> end;
    end.residuals.push_back(state.norm);
    T best = std::numeric_limits<T>::infinity();  // the smallest residual that a restart began from
    std::int64_t taken = 0, failures = 0;         // failures: restarts in a row from no less than half of it
    bool is_checked = true;
    while (true) {
        const bool going =
            std::isfinite(state.norm) && state.norm > rtol && !state.halted && failures < rule.patience;
        const bool is_last = taken >= rule.max_iterations;
        if (!is_checked && (!going || is_last || taken % rule.check_every == 0)) {
            is_checked = true;
            if (state.check(rtol)) {
                failures = math::failures_after_restart(failures, state.norm, best,
                                                        state.is_rounding(rule.rtol), rule.patience);
                best = std::min(best, state.norm);
            }
            end.residuals.back() = state.norm;
            continue;
        }
        if (is_last || !going) break;
        between();
        state.step();
        ++taken;
        if (!state.halted) end.residuals.push_back(state.norm);
        is_checked = false;
    }
    end.products = state.products;
    end.negative = state.negative;
    end.halted = state.halted;
    end.restarted = best < std::numeric_limits<T>::infinity();
    end.stagnated = failures >= rule.patience;
    end.operator_norm = state.operator_norm;
    return end;
}

#define PARL_INSTANTIATE(T)                                                                                 \
    template SolveEnd<T> conjugate_gradients<T>(const ShiftedSystem<T>&, const StoppingRule&, const T*, T*, \
                                                int, const std::function<void()>&);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cpu
