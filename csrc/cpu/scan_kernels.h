// The scans of scan.h for trajectories [first, last), on one thread, in each instruction set.
#pragma once

#include "cpu/isa.h"
#include "cpu/scan.h"

namespace parl::cpu {

PARL_IN_EACH_ISA(template <typename T>
                 void discounted_scan_range(const T* values, const Segments& segments, std::int64_t first,
                                            std::int64_t last, T discount, bool reverse, T* out);
                 template <typename T>
                 void linear_recurrence_range(const T* values, const T* coefficients,
                                              const Segments& segments, std::int64_t first, std::int64_t last,
                                              bool reverse, T* out);
                 template <typename T>
                 void lambda_returns_range(const Returns<T>& returns, const Segments& segments,
                                           std::int64_t first, std::int64_t last, bool add_values, T* out);
                 template <typename T>
                 void vtrace_range(const Returns<T>& returns, const T* log_ratios, Clips<T> clips,
                                   const Segments& segments, std::int64_t first, std::int64_t last,
                                   T* targets, T* advantages);)

}  // namespace parl::cpu
