// Threads of a kernel: OpenMP's pool, which at run time is torch's own.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "math/inline.h"

namespace parl::cpu {

// What a thread of a team knows of it.
struct Team {
    int thread;
    int threads;

    // Waits for the whole team.
    PARL_INLINE void barrier() const {
        if (threads == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
};

// As many threads as `work`, multiplications and additions, is worth, 1 to `most`.
inline int threads_worth(double work, std::int64_t most) {
    constexpr double kThreadWork = 8e6;
    const double worth = work / kThreadWork;
    if (worth < 1.0 || most < 1) return 1;
    return static_cast<int>(worth < static_cast<double>(most) ? static_cast<std::int64_t>(worth) : most);
}

// Calls function(Team) on `num_threads` threads, or fewer if OpenMP gives no more; on the caller's alone,
// without entering OpenMP, if that is 1. What `function` does must follow from the team alone, so that
// results are reproducible, and it must not throw.
template <typename Function>
PARL_INLINE void on_threads(int num_threads, const Function& function) {
#ifdef _OPENMP
    if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
        function(Team{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#else
    (void)num_threads;
#endif
    function(Team{0, 1});
}

}  // namespace parl::cpu
