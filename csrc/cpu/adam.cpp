#include "cpu/adam.h"

#include <cmath>

namespace parl::cpu {
namespace {

// Below this many elements a thread costs more to wake than it saves.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 16;

}  // namespace

template <typename T>
AdamStep<T> adam_step(double learning_rate, double beta1, double beta2, double epsilon, double step) {
    return {static_cast<T>(learning_rate / (1.0 - std::pow(beta1, step))),
            static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(beta2, step))),
            static_cast<T>(1.0 - beta1),
            static_cast<T>(beta2),
            static_cast<T>(1.0 - beta2),
            static_cast<T>(epsilon)};
}

template <typename T>
void adam(const AdamTensor<T>* tensors, std::int64_t count, [[maybe_unused]] int num_threads) {
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += tensors[i].size;
    const int parts = total < kParallelElements ? 1 : num_threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        PARL_DISPATCH(adam_range(tensors, count, total * part / parts, total * (part + 1) / parts));
    }
}

template AdamStep<float> adam_step<float>(double, double, double, double, double);
template AdamStep<double> adam_step<double>(double, double, double, double, double);
template void adam<float>(const AdamTensor<float>*, std::int64_t, int);
template void adam<double>(const AdamTensor<double>*, std::int64_t, int);

}  // namespace parl::cpu
