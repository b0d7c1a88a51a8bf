#include "cpu/preference.h"

#include "offsets.h"

namespace parl::bindings {
namespace {

// Segments of one side: of `offsets` (M + 1,), or for None dense ones that follow each other.
cpu::SegmentLayout view_layout(py::handle offsets_tensor, std::int64_t num_steps, std::int64_t num_pairs,
                               const char* name) {
    if (!offsets_tensor.is_none()) {
        const Offsets offsets = view_offsets(offsets_tensor, name, num_steps);
        if (offsets.count != num_pairs) {
            throw py::value_error(std::string(name) + " must have " + std::to_string(num_pairs + 1) +
                                  " elements, got " + std::to_string(offsets.count + 1));
        }
        return {offsets.numbers, 0, 0, num_steps};
    }
    const std::int64_t length = num_pairs == 0 ? 0 : num_steps / num_pairs;
    if (length * num_pairs != num_steps) {
        throw py::value_error(std::string(name) + " must be given where " + std::to_string(num_steps) +
                              " steps are not " + std::to_string(num_pairs) + " segments of one length");
    }
    return {nullptr, length, length, num_steps};
}

std::int64_t per_member(const TensorView& view, std::int64_t members, const char* name) {
    if (members < 1 || view.size % members != 0) {
        throw py::value_error(std::string(name) + " must have one row for each of " +
                              std::to_string(members) + " members, got " + std::to_string(view.size) +
                              " elements");
    }
    return view.size / members;
}

void preference_loss(py::handle first_tensor, py::handle first_offsets, py::handle second_tensor,
                     py::handle second_offsets, py::handle labels_tensor, std::int64_t members,
                     py::handle losses_tensor, py::handle logits_tensor, py::handle correct_tensor) {
    const TensorView first = view_contiguous(first_tensor, "first");
    const TensorView second = view_contiguous(second_tensor, "second");
    const TensorView labels = view_contiguous(labels_tensor, "labels");
    const TensorView losses = view_contiguous(losses_tensor, "losses");
    const TensorView logits = view_contiguous(logits_tensor, "logits");
    const TensorView correct = view_vector(correct_tensor, "correct");
    require_floating(first, "first");
    const std::int64_t num_pairs = per_member(losses, members, "losses");
    require(losses, first.dtype, losses.size, "losses");
    require(logits, first.dtype, losses.size, "logits");
    require(second, first.dtype, second.size, "second");
    require(labels, first.dtype, labels.size == num_pairs ? num_pairs : losses.size, "labels");
    require(correct, DType::kInt64, members, "correct");
    const cpu::SegmentLayout first_layout =
        view_layout(first_offsets, per_member(first, members, "first"), num_pairs, "first_offsets");
    const cpu::SegmentLayout second_layout =
        view_layout(second_offsets, per_member(second, members, "second"), num_pairs, "second_offsets");
    const std::int64_t label_stride = labels.size == num_pairs ? 0 : num_pairs;
    const py::gil_scoped_release release;
    const auto run = [&](auto type) {
        using T = decltype(type);
        PARL_DISPATCH(preference_loss(first.as<T>(), first_layout, second.as<T>(), second_layout,
                                      labels.as<T>(), label_stride, members, num_pairs, losses.as<T>(),
                                      logits.as<T>(), correct.as<std::int64_t>()));
    };
    first.dtype == DType::kFloat32 ? run(float()) : run(double());
}

void spread_over_segments(py::handle weights_tensor, double scale, py::handle offsets, std::int64_t members,
                          py::handle steps_tensor) {
    const TensorView weights = view_contiguous(weights_tensor, "weights");
    const TensorView steps = view_contiguous(steps_tensor, "steps");
    require_floating(weights, "weights");
    require(steps, weights.dtype, steps.size, "steps");
    const std::int64_t num_pairs = per_member(weights, members, "weights");
    const cpu::SegmentLayout layout =
        view_layout(offsets, per_member(steps, members, "steps"), num_pairs, "offsets");
    const py::gil_scoped_release release;
    const auto run = [&](auto type) {
        using T = decltype(type);
        PARL_DISPATCH(spread_over_segments(weights.as<T>(), static_cast<T>(scale), layout, members, num_pairs,
                                           steps.as<T>()));
    };
    weights.dtype == DType::kFloat32 ? run(float()) : run(double());
}

}  // namespace

void bind_preference(py::module_& module) {
    module.def(
        "preference_loss", &preference_loss, py::arg("first"), py::arg("first_offsets"), py::arg("second"),
        py::arg("second_offsets"), py::arg("labels"), py::arg("members"), py::arg("losses"),
        py::arg("logits"), py::arg("correct"),
        "Writes losses and logits (members, M) and correct (members,) int64 of the rewards first\n"
        "(members, T1) and second (members, T2); offsets (M+1,) int64, or None for segments of one length;\n"
        "labels (M,) or (members, M).");
    module.def("spread_over_segments", &spread_over_segments, py::arg("weights"), py::arg("scale"),
               py::arg("offsets"), py::arg("members"), py::arg("steps"),
               "Writes scale * weights (members, M) to every step of its segment, steps (members, T).");
}

}  // namespace parl::bindings
