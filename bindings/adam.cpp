#include "cpu/adam.h"

#include <vector>

#include "tensor_view.h"

namespace parl::bindings {
namespace {

template <typename T>
void run(const py::list& params, const py::list& gradients, const py::list& exp_avgs,
         const py::list& exp_avg_sqs, const py::list& steps, double learning_rate, double beta1, double beta2,
         double epsilon, int num_threads) {
    std::vector<cpu::AdamTensor<T>> tensors;
    std::vector<float*> counters;
    for (std::size_t i = 0; i < params.size(); ++i) {
        const TensorView param = view_contiguous(params[i], "params");
        const TensorView gradient = view_contiguous(gradients[i], "gradients");
        const TensorView exp_avg = view_contiguous(exp_avgs[i], "exp_avgs");
        const TensorView exp_avg_sq = view_contiguous(exp_avg_sqs[i], "exp_avg_sqs");
        const TensorView step = view_contiguous(steps[i], "steps");
        require(param, kDTypeOf<T>, param.size, "params");
        require(gradient, kDTypeOf<T>, param.size, "gradients");
        require(exp_avg, kDTypeOf<T>, param.size, "exp_avgs");
        require(exp_avg_sq, kDTypeOf<T>, param.size, "exp_avg_sqs");
        require(step, DType::kFloat32, 1, "steps");
        counters.push_back(step.as<float>());
        const double count = static_cast<double>(*counters.back()) + 1.0;
        tensors.push_back({param.as<T>(), gradient.as<T>(), exp_avg.as<T>(), exp_avg_sq.as<T>(), param.size,
                           cpu::adam_step<T>(learning_rate, beta1, beta2, epsilon, count)});
    }
    const py::gil_scoped_release release;
    for (float* counter : counters) *counter += 1.0F;
    cpu::adam(tensors.data(), static_cast<std::int64_t>(tensors.size()), num_threads);
}

void adam(const py::list& params, const py::list& gradients, const py::list& exp_avgs,
          const py::list& exp_avg_sqs, const py::list& steps, double learning_rate, double beta1,
          double beta2, double epsilon, int num_threads) {
    check_threads(num_threads);
    const std::pair<const char*, const py::list&> lists[] = {
        {"gradients", gradients}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"steps", steps}};
    for (const auto& [name, list] : lists) {
        if (list.size() != params.size()) {
            throw py::value_error(std::string(name) + " must have as many tensors as params, " +
                                  std::to_string(params.size()) + ", got " + std::to_string(list.size()));
        }
    }
    if (params.empty()) return;
    const TensorView first = view_contiguous(params[0], "params");
    require_floating(first, "params");
    (first.dtype == DType::kFloat32 ? run<float> : run<double>)(params, gradients, exp_avgs, exp_avg_sqs,
                                                                steps, learning_rate, beta1, beta2, epsilon,
                                                                num_threads);
}

}  // namespace

void bind_adam(py::module_& module) {
    module.def(
        "adam", &adam, py::arg("params"), py::arg("gradients"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("steps"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"), py::arg("epsilon"),
        py::arg("num_threads"),
        "One step of torch.optim.Adam in place, on lists of dense tensors of any shapes and one dtype.\n"
        "steps: float32 tensors of one element, which are advanced.");
}

}  // namespace parl::bindings
