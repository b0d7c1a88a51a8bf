#include "linearization.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace parl::bindings {
namespace {

using math::Activation;

template <typename E, std::size_t kCount>
using Names = std::array<std::pair<const char*, E>, kCount>;
constexpr Names<Activation, 4> kActivations{{{"tanh", Activation::kTanh},
                                             {"relu", Activation::kRelu},
                                             {"silu", Activation::kSilu},
                                             {"leaky_relu", Activation::kLeakyRelu}}};
constexpr Names<cpu::Head, 4> kHeads{{{"categorical", cpu::Head::kCategorical},
                                      {"state", cpu::Head::kGaussianState},
                                      {"global", cpu::Head::kGaussianGlobal},
                                      {"fixed", cpu::Head::kGaussianFixed}}};

template <typename E, std::size_t kCount>
E named(const Names<E, kCount>& names, const std::string& name, const char* argument) {
    std::string known;
    for (const auto& [each, value] : names) {
        if (name == each) return value;
        known += (known.empty() ? "" : ", ") + std::string(each);
    }
    throw py::value_error(std::string(argument) + " must be one of " + known + ", got '" + name + "'");
}

template <typename T>
constexpr DType kDType = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

// The memory of a tensor (size,), or, if `rows` is not negative, (rows, size / rows).
template <typename E>
E* data(py::handle tensor, const char* name, DType dtype, std::int64_t size, std::int64_t rows = -1) {
    TensorView view;
    if (rows < 0) {
        view = view_vector(tensor, name);
    } else {
        if (tensor.attr("dim")().template cast<int>() != 2 ||
            tensor.attr("size")(0).template cast<std::int64_t>() != rows) {
            throw py::value_error(std::string(name) + " must have two dimensions, the first of " +
                                  std::to_string(rows));
        }
        if (!tensor.attr("is_contiguous")().template cast<bool>()) {
            throw py::value_error(std::string(name) + " must be contiguous");
        }
        view = view_vector(tensor.attr("view")(-1), name);
    }
    if (view.dtype != dtype) {
        constexpr std::array<const char*, 3> kNames{"float32", "float64", "int64"};
        throw py::type_error(std::string(name) + " must be of dtype " +
                             kNames[static_cast<std::size_t>(dtype)] + ", got " +
                             kNames[static_cast<std::size_t>(view.dtype)]);
    }
    if (view.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(view.size));
    }
    if (view.data == nullptr && size > 0) throw py::value_error(std::string(name) + " has no memory");
    return view.as<E>();
}

void check_threads(int num_threads) {
    if (num_threads < 1) {
        throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
    }
}

template <typename T>
BoundLinearization<T> make(const std::vector<std::int64_t>& widths, const std::string& activation,
                           const std::string& head_name, bool squash, py::handle params,
                           const std::optional<py::object>& log_std, py::handle observations,
                           py::handle actions, py::handle offsets_tensor, int num_threads) {
    check_threads(num_threads);
    if (widths.size() < 2) throw py::value_error("widths must have at least two elements");
    const cpu::Head head = named(kHeads, head_name, "head");
    std::int64_t num_params = head == cpu::Head::kGaussianGlobal ? widths.back() : 0;
    for (std::size_t l = 0; l < widths.size(); ++l) {
        if (widths[l] < 1) throw py::value_error("widths must be positive, got " + std::to_string(widths[l]));
        if (l > 0) num_params += (widths[l - 1] + 1) * widths[l];
    }
    if (head == cpu::Head::kGaussianState && widths.back() % 2 != 0) {
        throw py::value_error("widths must end with an even number for head 'state', got " +
                              std::to_string(widths.back()));
    }
    cpu::Policy<T> policy{};
    policy.widths = widths.data();
    policy.num_layers = static_cast<int>(widths.size()) - 1;
    policy.activation = named(kActivations, activation, "activation");
    policy.head = head;
    policy.squash = squash;
    policy.params = data<T>(params, "params", kDType<T>, num_params);
    if (log_std.has_value() != (head == cpu::Head::kGaussianFixed)) {
        throw py::value_error("log_std must be given for head 'fixed', and for no other");
    }
    if (log_std) policy.log_std = data<T>(*log_std, "log_std", kDType<T>, widths.back());

    cpu::Steps<T> steps{};
    const TensorView offsets = view_vector(offsets_tensor, "offsets");
    if (offsets.dtype != DType::kInt64) throw py::type_error("offsets must be int64, got a floating dtype");
    if (offsets.size < 1) throw py::value_error("offsets must have at least one element, got none");
    steps.offsets = offsets.as<std::int64_t>();
    steps.num_trajectories = offsets.size - 1;
    steps.num_steps = steps.offsets[steps.num_trajectories];
    for (std::int64_t i = 0; i <= steps.num_trajectories; ++i) {
        if (steps.offsets[i] < (i > 0 ? steps.offsets[i - 1] : 0) || steps.offsets[0] != 0) {
            throw py::value_error("offsets must start at 0 and not decrease");
        }
    }
    const std::int64_t num_steps = steps.num_steps;
    steps.observations =
        data<T>(observations, "observations", kDType<T>, num_steps * widths.front(), num_steps);
    if (head == cpu::Head::kCategorical) {
        steps.indices = data<std::int64_t>(actions, "actions", DType::kInt64, num_steps);
        for (std::int64_t t = 0; t < num_steps; ++t) {
            if (steps.indices[t] < 0 || steps.indices[t] >= widths.back()) {
                throw py::value_error("actions must be at least 0 and less than " +
                                      std::to_string(widths.back()) + ", got " +
                                      std::to_string(steps.indices[t]));
            }
        }
    } else {
        const std::int64_t action_dim = head == cpu::Head::kGaussianState ? widths.back() / 2 : widths.back();
        steps.actions = data<T>(actions, "actions", kDType<T>, num_steps * action_dim, num_steps);
    }
    const py::gil_scoped_release release;
    auto shared = std::make_shared<SharedLinearization<T>>();
    shared->native.reset(cpu::linearize(policy, steps, num_threads));
    return {std::move(shared)};
}

py::object linearize_mlp(const std::vector<std::int64_t>& widths, const std::string& activation,
                         const std::string& head, bool squash, py::handle params,
                         const std::optional<py::object>& log_std, py::handle observations,
                         py::handle actions, py::handle offsets, int num_threads) {
    switch (view_vector(params, "params").dtype) {
        case DType::kFloat32:
            return py::cast(make<float>(widths, activation, head, squash, params, log_std, observations,
                                        actions, offsets, num_threads));
        case DType::kFloat64:
            return py::cast(make<double>(widths, activation, head, squash, params, log_std, observations,
                                         actions, offsets, num_threads));
        default:
            throw py::type_error("params must be float32 or float64, got int64");
    }
}

template <typename T>
void bind(py::module_& module, const char* linearization, const char* operator_name) {
    using Bound = BoundLinearization<T>;
    using Operator = BoundCurvature<T>;
    const auto steps = [](const Bound& self) { return self.shared->native->num_steps(); };
    const auto size = [](const Bound& self) { return self.shared->native->num_params(); };
    py::class_<Bound>(module, linearization)
        .def_property_readonly("num_params", size)
        .def(
            "log_prob",
            [steps](const Bound& self, py::handle out) {
                T* const to = data<T>(out, "out", kDType<T>, steps(self));
                const T* const from = self.shared->native->log_prob();
                for (std::int64_t t = 0; t < steps(self); ++t) to[t] = from[t];
            },
            py::arg("out"))
        .def(
            "jvp",
            [=](const Bound& self, py::handle v, py::handle out, int num_threads) {
                check_threads(num_threads);
                const T* const from = data<T>(v, "v", kDType<T>, size(self));
                T* const to = data<T>(out, "out", kDType<T>, steps(self));
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.shared->native->jvp(from, to, num_threads);
            },
            py::arg("v"), py::arg("out"), py::arg("num_threads"))
        .def(
            "vjp",
            [=](const Bound& self, py::handle w, py::handle out, int num_threads) {
                check_threads(num_threads);
                const T* const from = data<T>(w, "w", kDType<T>, steps(self));
                T* const to = data<T>(out, "out", kDType<T>, size(self));
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.shared->native->vjp(from, to, num_threads);
            },
            py::arg("w"), py::arg("out"), py::arg("num_threads"))
        .def(
            "scores",
            [=](const Bound& self, py::handle w, py::handle out, int num_threads) {
                check_threads(num_threads);
                const std::int64_t rows = self.shared->native->num_trajectories();
                const T* const from = data<T>(w, "w", kDType<T>, steps(self));
                T* const to = data<T>(out, "out", kDType<T>, rows * size(self), rows);
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.shared->native->scores(from, to, num_threads);
            },
            py::arg("w"), py::arg("out"), py::arg("num_threads"))
        .def(
            "curvature",
            [=](const Bound& self, const std::optional<py::object>& hessian,
                const std::optional<py::object>& fisher, const std::optional<py::object>& scores,
                double damping, int num_threads) {
                check_threads(num_threads);
                const auto weights = [&](const std::optional<py::object>& tensor, const char* name) {
                    return tensor ? data<const T>(*tensor, name, kDType<T>, steps(self)) : nullptr;
                };
                const cpu::Terms<T> terms{weights(hessian, "hessian"), weights(fisher, "fisher"),
                                          weights(scores, "scores"), static_cast<T>(damping)};
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                return Operator{self.shared, std::unique_ptr<cpu::Curvature<T>>(
                                                 self.shared->native->curvature(terms, num_threads))};
            },
            py::arg("hessian"), py::arg("fisher"), py::arg("scores"), py::arg("damping"),
            py::arg("num_threads"));
    py::class_<Operator>(module, operator_name)
        .def(
            "apply",
            [](const Operator& self, py::handle v, py::handle out, const std::optional<py::object>& along,
               int num_threads) {
                check_threads(num_threads);
                const std::int64_t params = self.shared->native->num_params();
                const T* const from = data<T>(v, "v", kDType<T>, params);
                T* const to = data<T>(out, "out", kDType<T>, params);
                T* const products =
                    along ? data<T>(*along, "along", kDType<T>, self.shared->native->num_steps()) : nullptr;
                if (from == to) throw py::value_error("out must not be v");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.native->apply(from, to, products, num_threads);
            },
            py::arg("v"), py::arg("out"), py::arg("along"), py::arg("num_threads"))
        .def(
            "apply_block",
            [](const Operator& self, py::handle v, py::handle out, int num_threads) {
                check_threads(num_threads);
                const std::int64_t params = self.shared->native->num_params();
                const std::int64_t count = v.attr("size")(0).cast<std::int64_t>();
                const T* const from = data<T>(v, "v", kDType<T>, count * params, count);
                T* const to = data<T>(out, "out", kDType<T>, count * params, count);
                if (from == to) throw py::value_error("out must not be v");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                for (std::int64_t k = 0; k < count; ++k) {
                    self.native->apply(from + k * params, to + k * params, nullptr, num_threads);
                }
            },
            py::arg("v"), py::arg("out"), py::arg("num_threads"));
}

}  // namespace

void bind_linearization(py::module_& module) {
    bind<float>(module, "MlpLinearizationFloat32", "MlpCurvatureFloat32");
    bind<double>(module, "MlpLinearizationFloat64", "MlpCurvatureFloat64");
    module.def("linearize_mlp", &linearize_mlp, py::arg("widths"), py::arg("activation"), py::arg("head"),
               py::arg("squash"), py::arg("params"), py::arg("log_std"), py::arg("observations"),
               py::arg("actions"), py::arg("offsets"), py::arg("num_threads"),
               "A policy's log-probabilities linearised: see parl_core.hypergrad.native_linearize.");
}

}  // namespace parl::bindings
