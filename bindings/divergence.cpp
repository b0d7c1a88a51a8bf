#include "cpu/divergence.h"

#include <array>

#include "cpu/pages.h"
#include "offsets.h"

namespace parl::bindings {
namespace {

using math::Divergence;

struct Named {
    const char* name;
    Divergence function;
};
constexpr std::array<Named, 14> kFunctions{{{"kl", Divergence::kKl},
                                            {"kl_k2", Divergence::kKlK2},
                                            {"kl_k3", Divergence::kKlK3},
                                            {"reverse_kl", Divergence::kReverseKl},
                                            {"reverse_kl_k2", Divergence::kReverseKlK2},
                                            {"reverse_kl_k3", Divergence::kReverseKlK3},
                                            {"jensen_shannon", Divergence::kJensenShannon},
                                            {"jeffreys", Divergence::kJeffreys},
                                            {"chi_squared", Divergence::kChiSquared},
                                            {"neyman", Divergence::kNeyman},
                                            {"squared_hellinger", Divergence::kSquaredHellinger},
                                            {"total_variation", Divergence::kTotalVariation},
                                            {"alpha_low", Divergence::kAlphaLow},
                                            {"alpha_high", Divergence::kAlphaHigh}}};

cpu::DivergenceTerm term_of(const std::string& function, bool flipped, bool over_ratio, double alpha) {
    for (const Named& named : kFunctions) {
        if (function == named.name) return {named.function, flipped, over_ratio, alpha};
    }
    throw py::value_error("function must be the name of a divergence's summand, got '" + function + "'");
}

TensorView view_floats(py::handle tensor, const char* name) {
    const TensorView view = view_vector(tensor, name);
    require_floating(view, name);
    return view;
}

// None gives a null pointer; else a vector of `like`'s dtype with `size` elements.
TensorView view_optional(py::handle tensor, const char* name, const TensorView& like, std::int64_t size) {
    if (tensor.is_none()) return {};
    const TensorView view = view_vector(tensor, name);
    if (view.dtype != like.dtype) {
        throw py::type_error(std::string(name) + " must be of dtype " + dtype_name(like.dtype) +
                             " as log_ratio is, got " + dtype_name(view.dtype));
    }
    if (view.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(view.size));
    }
    return view;
}

// The sum, rounded to T: beyond its range to an infinity.
template <typename T>
double run_sum(const TensorView& log_ratio, const Offsets& offsets, const TensorView& weights,
               const TensorView& gradient, const cpu::DivergenceTerm& term, int num_threads) {
    const py::gil_scoped_release release;
    if (gradient.data != nullptr)
        cpu::prefer_huge_pages(gradient.data, gradient.size * static_cast<std::int64_t>(sizeof(T)));
    const double total =
        offsets.numbers == nullptr
            ? PARL_DISPATCH(divergence_sum<T>(log_ratio.as<T>(), log_ratio.size, weights.as<T>(), term,
                                              num_threads, gradient.as<T>()))
            : PARL_DISPATCH(divergence_sum_of_trajectories<T>(log_ratio.as<T>(), offsets.numbers,
                                                              offsets.count, weights.as<T>(), term,
                                                              num_threads, gradient.as<T>()));
    return static_cast<T>(total);
}

double divergence_sum(py::handle log_ratio_tensor, py::handle offsets_tensor, py::handle weights_tensor,
                      py::handle gradient_tensor, const std::string& function, bool flipped, bool over_ratio,
                      double alpha, int num_threads) {
    check_threads(num_threads);
    const TensorView log_ratio = view_floats(log_ratio_tensor, "log_ratio");
    Offsets offsets{nullptr, log_ratio.size};
    if (!offsets_tensor.is_none()) offsets = view_offsets(offsets_tensor, "offsets", log_ratio.size);
    const std::int64_t samples = offsets.count;
    if (samples < 1) {
        const char* const name = offsets.numbers == nullptr ? "log_ratio" : "offsets";
        throw py::value_error(std::string(name) + " must be of one sample or more, got none");
    }
    const TensorView weights = view_optional(weights_tensor, "weights", log_ratio, samples);
    const TensorView gradient = view_optional(gradient_tensor, "gradient", log_ratio, log_ratio.size);
    const cpu::DivergenceTerm term = term_of(function, flipped, over_ratio, alpha);
    return log_ratio.dtype == DType::kFloat32
               ? run_sum<float>(log_ratio, offsets, weights, gradient, term, num_threads)
               : run_sum<double>(log_ratio, offsets, weights, gradient, term, num_threads);
}

template <typename T>
void run_terms(const TensorView& log_ratio, const TensorView& out, const cpu::DivergenceTerm& term, int order,
               int num_threads) {
    const py::gil_scoped_release release;
    cpu::prefer_huge_pages(out.data, out.size * static_cast<std::int64_t>(sizeof(T)));
    PARL_DISPATCH(
        divergence_terms<T>(log_ratio.as<T>(), log_ratio.size, term, order, num_threads, out.as<T>()));
}

void divergence_terms(py::handle log_ratio_tensor, py::handle out_tensor, const std::string& function,
                      bool flipped, bool over_ratio, double alpha, int order, int num_threads) {
    check_threads(num_threads);
    const TensorView log_ratio = view_floats(log_ratio_tensor, "log_ratio");
    if (out_tensor.is_none()) throw py::type_error("out must be a Tensor, got None");
    const TensorView out = view_optional(out_tensor, "out", log_ratio, log_ratio.size);
    if (order < 0 || order > 2)
        throw py::value_error("order must be 0, 1 or 2, got " + std::to_string(order));
    const cpu::DivergenceTerm term = term_of(function, flipped, over_ratio, alpha);
    if (log_ratio.dtype == DType::kFloat32) {
        run_terms<float>(log_ratio, out, term, order, num_threads);
    } else {
        run_terms<double>(log_ratio, out, term, order, num_threads);
    }
}

}  // namespace

void bind_divergence(py::module_& module) {
    module.def(
        "divergence_sum", &divergence_sum, py::arg("log_ratio"), py::arg("offsets").none(true),
        py::arg("weights").none(true), py::arg("gradient").none(true), py::arg("function"),
        py::arg("flipped"), py::arg("over_ratio"), py::arg("alpha"), py::arg("num_threads"),
        "The weighted sum, or the mean where weights are None, of a divergence's summand over log_ratio\n"
        "(T,), or over its sums in each trajectory; writes the gradient, unless None, into gradient (T,).");
    module.def("divergence_terms", &divergence_terms, py::arg("log_ratio"), py::arg("out"),
               py::arg("function"), py::arg("flipped"), py::arg("over_ratio"), py::arg("alpha"),
               py::arg("order"), py::arg("num_threads"),
               "Writes the summand of every element of log_ratio (T,), or its first or second derivative, "
               "into out (T,).");
}

}  // namespace parl::bindings
