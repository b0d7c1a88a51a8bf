#include "cpu/adam.h"
#include "math/inline.h"

namespace parl::cpu::PARL_ISA {
namespace {

// Calls visit(tensor, first, last) for the part of every tensor that lies in [begin, end).
template <typename Tensor, typename Visit>
PARL_INLINE void for_each_part(const Tensor* tensors, std::int64_t count, std::int64_t begin,
                               std::int64_t end, Visit visit) {
    std::int64_t start = 0;
    for (std::int64_t i = 0; i < count && start < end; ++i) {
        const std::int64_t stop = start + tensors[i].size;
        const std::int64_t first = begin > start ? begin : start;
        const std::int64_t last = end < stop ? end : stop;
        if (first < last) visit(tensors[i], first - start, last - start);
        start = stop;
    }
}

template <typename T>
PARL_INLINE T square_root(T x) {
    if constexpr (sizeof(T) == 4) {
        return __builtin_sqrtf(x);
    } else {
        return __builtin_sqrt(x);
    }
}

// Plain loops over arrays that do not overlap: the compiler makes vectors of them.
template <typename T>
void adam_part(T* __restrict param, const T* __restrict gradient, T* __restrict exp_avg,
               T* __restrict exp_avg_sq, std::int64_t first, std::int64_t last, AdamStep<T> step) {
    for (std::int64_t i = first; i < last; ++i) {
        const T g = gradient[i];
        const T mean = exp_avg[i] + step.first_weight * (g - exp_avg[i]);
        const T square = exp_avg_sq[i] * step.second_decay + step.second_weight * g * g;
        exp_avg[i] = mean;
        exp_avg_sq[i] = square;
        param[i] -= step.step_size * mean / (square_root(square) * step.second_correction + step.epsilon);
    }
}

template <typename T>
void polyak_part(T* __restrict target, const T* __restrict source, T weight, std::int64_t first,
                 std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) target[i] += weight * (source[i] - target[i]);
}

}  // namespace

template <typename T>
void adam_range(const AdamTensor<T>* tensors, std::int64_t count, std::int64_t begin, std::int64_t end) {
    for_each_part(tensors, count, begin, end, [](const auto& t, std::int64_t first, std::int64_t last) {
        adam_part(t.param, t.gradient, t.exp_avg, t.exp_avg_sq, first, last, t.step);
    });
}

template <typename T>
void polyak_range(const PolyakTensor<T>* tensors, std::int64_t count, T weight, std::int64_t begin,
                  std::int64_t end) {
    for_each_part(tensors, count, begin, end, [=](const auto& t, std::int64_t first, std::int64_t last) {
        polyak_part(t.target, t.source, weight, first, last);
    });
}

template void adam_range<float>(const AdamTensor<float>*, std::int64_t, std::int64_t, std::int64_t);
template void adam_range<double>(const AdamTensor<double>*, std::int64_t, std::int64_t, std::int64_t);
template void polyak_range<float>(const PolyakTensor<float>*, std::int64_t, float, std::int64_t,
                                  std::int64_t);
template void polyak_range<double>(const PolyakTensor<double>*, std::int64_t, double, std::int64_t,
                                   std::int64_t);

}  // namespace parl::cpu::PARL_ISA
