// Activation functions with their first and second derivatives, for scalars and vectors alike.
#pragma once

#include "math/elementary.h"

namespace parl::math {

enum class Activation { kTanh, kRelu, kSilu, kLeakyRelu };

// What each offers: `value(x)`; `kFromValue`, whether the derivatives follow from the value, as
// `slope_from_value(a)` for the first and `ratio_from_value(a)` for the second divided by it. If not,
// `slope(x)` and `bend(x)` are the first and the second derivative.
struct Tanh {
    static constexpr bool kFromValue = true;
    template <typename V>
    static PARL_INLINE V value(V x) {
        return tanh(x);
    }
    template <typename V>
    static PARL_INLINE V slope_from_value(V a) {
        return V(1) - a * a;
    }
    template <typename V>
    static PARL_INLINE V ratio_from_value(V a) {
        return V(-2) * a;
    }
};

struct Relu {
    static constexpr bool kFromValue = true;
    template <typename V>
    static PARL_INLINE V value(V x) {
        return select(x < V(0), V(0), x);
    }
    template <typename V>
    static PARL_INLINE V slope_from_value(V a) {
        return select(a > V(0), V(1), V(0));
    }
    template <typename V>
    static PARL_INLINE V ratio_from_value(V) {
        return V(0);
    }
};

// With torch's default slope of .01 below zero.
struct LeakyRelu {
    static constexpr bool kFromValue = true;
    template <typename V>
    static PARL_INLINE V value(V x) {
        return select(x < V(0), V(typename ScalarOf<V>::type(0.01)) * x, x);
    }
    template <typename V>
    static PARL_INLINE V slope_from_value(V a) {
        return select(a > V(0), V(1), V(typename ScalarOf<V>::type(0.01)));
    }
    template <typename V>
    static PARL_INLINE V ratio_from_value(V) {
        return V(0);
    }
};

// x·σ(x), σ the sigmoid.
struct Silu {
    static constexpr bool kFromValue = false;
    template <typename V>
    static PARL_INLINE V value(V x) {
        return x * sigmoid(x);
    }
    template <typename V>
    static PARL_INLINE V slope(V x) {
        const V s = sigmoid(x);
        return s * (V(1) + x * (V(1) - s));
    }
    template <typename V>
    static PARL_INLINE V bend(V x) {
        const V s = sigmoid(x);
        return s * (V(1) - s) * (V(2) + x * (V(1) - V(2) * s));
    }
};

// Calls function(Tanh{}) or whichever `activation` names.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // on the host alone, where `function` launches a kernel
#endif
template <typename Function>
PARL_INLINE void with_activation(Activation activation, const Function& function) {
    switch (activation) {
        case Activation::kTanh:
            return function(Tanh{});
        case Activation::kRelu:
            return function(Relu{});
        case Activation::kSilu:
            return function(Silu{});
        case Activation::kLeakyRelu:
            return function(LeakyRelu{});
    }
}

}  // namespace parl::math
