#include "linearization.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/pages.h"
#include "offsets.h"
#include "policy_names.h"

namespace parl::bindings {
namespace {

// A tensor (size,), or, if `rows` is not negative, (rows, size / rows).
TensorView view_sized(py::handle tensor, const char* name, DType dtype, std::int64_t size,
                      std::int64_t rows = -1) {
    const TensorView view = rows < 0 ? view_vector(tensor, name) : view_contiguous(tensor, name);
    if (rows >= 0) {
        const py::tuple shape(attribute(tensor, torch_names().shape));
        if (shape.size() != 2 || shape[0].cast<std::int64_t>() != rows) {
            throw py::value_error(std::string(name) + " must have two dimensions, the first of " +
                                  std::to_string(rows));
        }
    }
    require(view, dtype, size, name);
    if (view.data == nullptr && size > 0) throw py::value_error(std::string(name) + " has no memory");
    return view;
}

template <typename E>
E* data(py::handle tensor, const char* name, DType dtype, std::int64_t size, std::int64_t rows = -1) {
    return view_sized(tensor, name, dtype, size, rows).as<E>();
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
    policy.params = data<T>(params, "params", kDTypeOf<T>, num_params);
    if (log_std.has_value() != (head == cpu::Head::kGaussianFixed)) {
        throw py::value_error("log_std must be given for head 'fixed', and for no other");
    }
    if (log_std) policy.log_std = data<T>(*log_std, "log_std", kDTypeOf<T>, widths.back());

    cpu::Steps<T> steps{};
    const Offsets offsets = view_offsets(offsets_tensor, "offsets");
    steps.offsets = offsets.numbers;
    steps.num_trajectories = offsets.count;
    steps.num_steps = offsets.end();
    const std::int64_t num_steps = steps.num_steps;
    steps.observations =
        data<T>(observations, "observations", kDTypeOf<T>, num_steps * widths.front(), num_steps);
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
        steps.actions = data<T>(actions, "actions", kDTypeOf<T>, num_steps * action_dim, num_steps);
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
                T* const to = data<T>(out, "out", kDTypeOf<T>, steps(self));
                const T* const from = self.shared->native->log_prob();
                for (std::int64_t t = 0; t < steps(self); ++t) to[t] = from[t];
            },
            py::arg("out"))
        .def(
            "jvp",
            [=](const Bound& self, py::handle v, py::handle out, int num_threads) {
                check_threads(num_threads);
                const TensorView from = view_sized(v, "v", kDTypeOf<T>, size(self));
                const TensorView to = view_sized(out, "out", kDTypeOf<T>, steps(self));
                require_disjoint(to, "out", from, "v");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.shared->native->jvp(from.as<T>(), to.as<T>(), num_threads);
            },
            py::arg("v"), py::arg("out"), py::arg("num_threads"))
        .def(
            "vjp",
            [=](const Bound& self, py::handle w, py::handle out, int num_threads) {
                check_threads(num_threads);
                const TensorView from = view_sized(w, "w", kDTypeOf<T>, steps(self));
                const TensorView to = view_sized(out, "out", kDTypeOf<T>, size(self));
                require_disjoint(to, "out", from, "w");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.shared->native->vjp(from.as<T>(), to.as<T>(), num_threads);
            },
            py::arg("w"), py::arg("out"), py::arg("num_threads"))
        .def(
            "scores",
            [=](const Bound& self, py::handle w, py::handle out, int num_threads) {
                check_threads(num_threads);
                const std::int64_t rows = self.shared->native->num_trajectories();
                const TensorView from = view_sized(w, "w", kDTypeOf<T>, steps(self));
                const TensorView to = view_sized(out, "out", kDTypeOf<T>, rows * size(self), rows);
                require_disjoint(to, "out", from, "w");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                cpu::prefer_huge_pages(to.data, to.size * static_cast<std::int64_t>(sizeof(T)));
                self.shared->native->scores(from.as<T>(), to.as<T>(), num_threads);
            },
            py::arg("w"), py::arg("out"), py::arg("num_threads"))
        .def(
            "curvature",
            [=](const Bound& self, const std::optional<py::object>& hessian,
                const std::optional<py::object>& fisher, const std::optional<py::object>& scores,
                double damping, int num_threads) {
                check_threads(num_threads);
                const auto weights = [&](const std::optional<py::object>& tensor, const char* name) {
                    return tensor ? data<const T>(*tensor, name, kDTypeOf<T>, steps(self)) : nullptr;
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
                const TensorView from = view_sized(v, "v", kDTypeOf<T>, params);
                const TensorView to = view_sized(out, "out", kDTypeOf<T>, params);
                require_disjoint(to, "out", from, "v");
                TensorView products{};
                if (along) {
                    products = view_sized(*along, "along", kDTypeOf<T>, self.shared->native->num_steps());
                    require_disjoint(products, "along", from, "v");
                    require_disjoint(products, "along", to, "out");
                }
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                self.native->apply(from.as<T>(), to.as<T>(), products.as<T>(), num_threads);
            },
            py::arg("v"), py::arg("out"), py::arg("along"), py::arg("num_threads"))
        .def(
            "apply_block",
            [](const Operator& self, py::handle v, py::handle out, int num_threads) {
                check_threads(num_threads);
                const std::int64_t params = self.shared->native->num_params();
                require_tensor(v, "v");
                const py::tuple shape(attribute(v, torch_names().shape));
                const std::int64_t count = shape.empty() ? 0 : shape[0].cast<std::int64_t>();
                const TensorView from = view_sized(v, "v", kDTypeOf<T>, count * params, count);
                const TensorView to = view_sized(out, "out", kDTypeOf<T>, count * params, count);
                require_disjoint(to, "out", from, "v");
                const py::gil_scoped_release release;
                const std::lock_guard lock(self.shared->mutex);
                for (std::int64_t k = 0; k < count; ++k) {
                    self.native->apply(from.as<T>() + k * params, to.as<T>() + k * params, nullptr,
                                       num_threads);
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
