#include "cpu/elementary.h"

#include "cpu/simd.h"

namespace parl::cpu::PARL_ISA {
namespace {

template <typename V>
V evaluate(Elementary function, V x) {
    switch (function) {
        case Elementary::kExp:
            return math::exp(x);
        case Elementary::kExpm1:
            return math::expm1(x);
        case Elementary::kLog:
            return math::log(x);
        case Elementary::kLog1p:
            return math::log1p(x);
        case Elementary::kTanh:
            return math::tanh(x);
        case Elementary::kSigmoid:
            return math::sigmoid(x);
        case Elementary::kSoftplus:
            return math::softplus(x);
    }
    return x;
}

}  // namespace

// Whole vectors, then what is left as scalars: both are tested.
template <typename T>
void elementary(Elementary function, const T* values, std::int64_t count, T* out) {
    using V = Vec<T>;
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) evaluate(function, V::load(values + i)).store(out + i);
    for (; i < count; ++i) out[i] = evaluate(function, values[i]);
}

template void elementary<float>(Elementary, const float*, std::int64_t, float*);
template void elementary<double>(Elementary, const double*, std::int64_t, double*);

}  // namespace parl::cpu::PARL_ISA
