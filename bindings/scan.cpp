#include "cpu/scan.h"

#include "offsets.h"

namespace parl::bindings {
namespace {

TensorView view_steps(py::handle tensor, const char* name, const TensorView& like, const char* like_name) {
    const TensorView view = view_contiguous(tensor, name);
    if (view.dtype != like.dtype) {
        throw py::type_error(std::string(name) + " must have the dtype of " + like_name);
    }
    if (view.size != like.size) {
        throw py::value_error(std::string(name) + " must have as many elements as " + like_name + ", " +
                              std::to_string(like.size) + ", got " + std::to_string(view.size));
    }
    return view;
}

TensorView view_floats(py::handle tensor, const char* name) {
    const TensorView view = view_contiguous(tensor, name);
    require_floating(view, name);
    return view;
}

// The trajectories that `offsets` cut the steps into; or, of None, the rows of `tensor`, the argument called
// `name`, whose view is `steps`.
cpu::Segments segments_of(py::handle tensor, const char* name, const TensorView& steps, py::handle offsets) {
    if (offsets.is_none()) {
        const py::tuple shape(attribute(tensor, torch_names().shape));
        if (shape.empty())
            throw py::value_error(std::string(name) + " must have one dimension or more, got 0");
        const auto horizon = shape[shape.size() - 1].cast<std::int64_t>();
        std::int64_t count = 1;
        for (std::size_t k = 0; k + 1 < shape.size(); ++k) count *= shape[k].cast<std::int64_t>();
        return {nullptr, count, horizon};
    }
    const Offsets view = view_offsets(offsets, "offsets", steps.size);
    return {view.numbers, view.count, 0};
}

// Calls run(T{}) without the GIL, T being the dtype of `view`.
template <typename Run>
void with_dtype(const TensorView& view, Run run) {
    const py::gil_scoped_release release;
    if (view.dtype == DType::kFloat32) {
        run(float{});
    } else {
        run(double{});
    }
}

void discounted_scan(py::handle values_tensor, double discount, py::handle offsets, py::handle out_tensor,
                     bool reverse, int num_threads) {
    check_threads(num_threads);
    const TensorView values = view_floats(values_tensor, "values");
    const TensorView out = view_steps(out_tensor, "out", values, "values");
    require_disjoint(out, "out", values, "values");
    const cpu::Segments segments = segments_of(values_tensor, "values", values, offsets);
    with_dtype(values, [&](auto zero) {
        using T = decltype(zero);
        cpu::discounted_scan(values.as<T>(), segments, static_cast<T>(discount), reverse, num_threads,
                             out.as<T>());
    });
}

void linear_recurrence(py::handle values_tensor, py::handle coefficients_tensor, py::handle offsets,
                       py::handle out_tensor, bool reverse, int num_threads) {
    check_threads(num_threads);
    const TensorView values = view_floats(values_tensor, "values");
    const TensorView coefficients = view_steps(coefficients_tensor, "coefficients", values, "values");
    const TensorView out = view_steps(out_tensor, "out", values, "values");
    require_disjoint(out, "out", values, "values");
    require_disjoint(out, "out", coefficients, "coefficients");
    const cpu::Segments segments = segments_of(values_tensor, "values", values, offsets);
    with_dtype(values, [&](auto zero) {
        using T = decltype(zero);
        cpu::linear_recurrence(values.as<T>(), coefficients.as<T>(), segments, reverse, num_threads,
                               out.as<T>());
    });
}

// Rewards, values and bootstrap, one per trajectory or None.
struct ReturnsView {
    TensorView rewards, values, bootstrap;
    cpu::Segments segments;
    double discount, trace_lambda;

    ReturnsView(py::handle rewards_tensor, py::handle values_tensor, py::handle bootstrap_tensor,
                py::handle offsets, double discount_, double trace_lambda_)
        : rewards(view_floats(rewards_tensor, "rewards")),
          values(view_steps(values_tensor, "values", rewards, "rewards")),
          bootstrap{},
          segments(segments_of(rewards_tensor, "rewards", rewards, offsets)),
          discount(discount_),
          trace_lambda(trace_lambda_) {
        if (bootstrap_tensor.is_none()) return;
        bootstrap = view_vector(bootstrap_tensor, "bootstrap");
        if (bootstrap.dtype != rewards.dtype)
            throw py::type_error("bootstrap must have the dtype of rewards");
        if (bootstrap.size != segments.count) {
            throw py::value_error("bootstrap must have one element for each of the " +
                                  std::to_string(segments.count) + " trajectories, got " +
                                  std::to_string(bootstrap.size));
        }
    }

    // An output of the steps, which shares no memory with what it is computed from.
    TensorView view_out(py::handle tensor, const char* name) const {
        const TensorView out = view_steps(tensor, name, rewards, "rewards");
        require_disjoint(out, name, rewards, "rewards");
        require_disjoint(out, name, values, "values");
        require_disjoint(out, name, bootstrap, "bootstrap");
        return out;
    }

    template <typename T>
    cpu::Returns<T> as() const {
        return {rewards.as<T>(), values.as<T>(), bootstrap.as<T>(), static_cast<T>(discount),
                static_cast<T>(trace_lambda)};
    }
};

void lambda_returns(py::handle rewards, py::handle values, py::handle bootstrap, py::handle offsets,
                    py::handle out_tensor, double discount, double trace_lambda, bool add_values,
                    int num_threads) {
    check_threads(num_threads);
    const ReturnsView view(rewards, values, bootstrap, offsets, discount, trace_lambda);
    const TensorView out = view.view_out(out_tensor, "out");
    with_dtype(view.rewards, [&](auto zero) {
        using T = decltype(zero);
        cpu::lambda_returns(view.as<T>(), view.segments, add_values, num_threads, out.as<T>());
    });
}

void vtrace(py::handle log_ratios_tensor, py::handle rewards, py::handle values, py::handle bootstrap,
            py::handle offsets, py::handle targets_tensor, py::handle advantages_tensor, double discount,
            double trace_lambda, double rho_clip, double c_clip, int num_threads) {
    check_threads(num_threads);
    const ReturnsView view(rewards, values, bootstrap, offsets, discount, trace_lambda);
    const TensorView log_ratios = view_steps(log_ratios_tensor, "log_ratios", view.rewards, "rewards");
    const TensorView targets = view.view_out(targets_tensor, "targets");
    const TensorView advantages = view.view_out(advantages_tensor, "advantages");
    require_disjoint(targets, "targets", log_ratios, "log_ratios");
    require_disjoint(advantages, "advantages", log_ratios, "log_ratios");
    require_disjoint(advantages, "advantages", targets, "targets");
    with_dtype(view.rewards, [&](auto zero) {
        using T = decltype(zero);
        const cpu::Clips<T> clips{static_cast<T>(rho_clip), static_cast<T>(c_clip)};
        cpu::vtrace(view.as<T>(), log_ratios.as<T>(), clips, view.segments, num_threads, targets.as<T>(),
                    advantages.as<T>());
    });
}

}  // namespace

void bind_scan(py::module_& module) {
    // Contents of `offsets` are checked here, in one pass, rather than by torch in several.
    module.def("discounted_scan", &discounted_scan, py::arg("values"), py::arg("discount"),
               py::arg("offsets"), py::arg("out"), py::arg("reverse"), py::arg("num_threads"),
               "Writes the discounted scan of values into out. The trajectories are those of offsets (N+1,), "
               "or of None the rows of values.");
    module.def("linear_recurrence", &linear_recurrence, py::arg("values"), py::arg("coefficients"),
               py::arg("offsets"), py::arg("out"), py::arg("reverse"), py::arg("num_threads"),
               "Writes the recurrence of values with a coefficient for every step into out.");
    module.def("lambda_returns", &lambda_returns, py::arg("rewards"), py::arg("values"), py::arg("bootstrap"),
               py::arg("offsets"), py::arg("out"), py::arg("discount"), py::arg("trace_lambda"),
               py::arg("add_values"), py::arg("num_threads"),
               "Writes generalized advantage estimates, with the values added if `add_values`, into out.");
    module.def("vtrace", &vtrace, py::arg("log_ratios"), py::arg("rewards"), py::arg("values"),
               py::arg("bootstrap"), py::arg("offsets"), py::arg("targets"), py::arg("advantages"),
               py::arg("discount"), py::arg("trace_lambda"), py::arg("rho_clip"), py::arg("c_clip"),
               py::arg("num_threads"), "Writes V-trace's value targets and advantages.");
}

}  // namespace parl::bindings
