// What Python calls a policy's activation and its head.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "math/activations.h"
#include "math/heads.h"

namespace parl::bindings {

template <typename E, std::size_t kCount>
using Names = std::array<std::pair<const char*, E>, kCount>;
inline constexpr Names<math::Activation, 4> kActivations{{{"tanh", math::Activation::kTanh},
                                                          {"relu", math::Activation::kRelu},
                                                          {"silu", math::Activation::kSilu},
                                                          {"leaky_relu", math::Activation::kLeakyRelu}}};
inline constexpr Names<math::Head, 4> kHeads{{{"categorical", math::Head::kCategorical},
                                              {"state", math::Head::kGaussianState},
                                              {"global", math::Head::kGaussianGlobal},
                                              {"fixed", math::Head::kGaussianFixed}}};

template <typename E, std::size_t kCount>
E named(const Names<E, kCount>& names, const std::string& name, const char* argument) {
    std::string known;
    for (const auto& [each, value] : names) {
        if (name == each) return value;
        known += (known.empty() ? "" : ", ") + std::string(each);
    }
    throw pybind11::value_error(std::string(argument) + " must be one of " + known + ", got '" + name + "'");
}

}  // namespace parl::bindings
