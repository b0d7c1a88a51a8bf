#include "cpu/actor.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <vector>

#include "tensor_view.h"

namespace parl::bindings {
namespace {

// A float32 policy of nn.Linear layers, whose parameters it reads where they lie.
class Actor {
  public:
    explicit Actor(const py::list& params) {
        if (params.empty() || params.size() % 2 != 0) {
            throw py::value_error("params must be a weight and a bias for each layer, got " +
                                  std::to_string(params.size()) + " tensors");
        }
        std::int64_t widest = 0;
        for (std::size_t i = 0; i < params.size(); i += 2) {
            const TensorView weight = view_contiguous(params[i], "params"),
                             bias = view_contiguous(params[i + 1], "params");
            require(weight, DType::kFloat32, weight.size, "params");
            require(bias, DType::kFloat32, bias.size, "params");
            require_shape(params[i + 1], "params", {bias.size});
            if (bias.size == 0) throw py::value_error("params must have one output or more in each layer");
            const std::int64_t inputs = layers_.empty() ? weight.size / bias.size : layers_.back().outputs;
            require_shape(params[i], "params", {bias.size, inputs});
            layers_.push_back({weight.as<float>(), bias.as<float>(), inputs, bias.size});
            widest = std::max(widest, bias.size);
            for (std::size_t which = i; which < i + 2; ++which) held_.push_back(py::object(params[which]));
        }
        if (layers_.back().outputs % 2 != 0) {
            throw py::value_error("params must end in two outputs for each coordinate of the action");
        }
        scratch_.resize(static_cast<std::size_t>(2 * widest));
    }

    bool is_current() const {
        for (std::size_t i = 0; i < held_.size(); ++i) {
            const ActorLayer& layer = layers_[i / 2];
            const void* const expected = i % 2 == 0 ? layer.weight : layer.bias;
            if (PyLong_AsVoidPtr(call(held_[i], torch_names().data_ptr).ptr()) != expected) return false;
        }
        return true;
    }

    py::array_t<float> act(const py::array_t<float, py::array::c_style | py::array::forcecast>& observations,
                           py::handle noise_tensor) {
        const std::int64_t obs_dim = layers_.front().inputs, act_dim = layers_.back().outputs / 2;
        const auto dim = observations.ndim();
        if (dim < 1 || dim > 2 || observations.shape(dim - 1) != obs_dim) {
            const std::string width = std::to_string(obs_dim);
            throw py::value_error("observation must be of shape (" + width + ",) or (n, " + width +
                                  "), got " + std::string(py::str(observations.attr("shape"))));
        }
        const std::int64_t rows = dim == 1 ? 1 : observations.shape(0);
        const float* noise = nullptr;
        if (!noise_tensor.is_none()) {
            const TensorView view = view_contiguous(noise_tensor, "noise");
            require(view, DType::kFloat32, rows * act_dim, "noise");
            noise = view.as<float>();
        }
        std::vector<py::ssize_t> shape(observations.shape(), observations.shape() + dim);
        shape.back() = act_dim;
        py::array_t<float> actions(shape);
        for (std::int64_t row = 0; row < rows; ++row) {
            PARL_DISPATCH(actor_act(layers_.data(), static_cast<int>(layers_.size()),
                                    observations.data() + row * obs_dim,
                                    noise == nullptr ? nullptr : noise + row * act_dim, scratch_.data(),
                                    actions.mutable_data() + row * act_dim));
        }
        return actions;
    }

  private:
    using ActorLayer = cpu::ActorLayer<float>;
    std::vector<ActorLayer> layers_;
    std::vector<py::object> held_;
    std::vector<float> scratch_;
};

}  // namespace

void bind_actor(py::module_& module) {
    py::class_<Actor>(module, "Actor")
        .def(py::init<const py::list&>(), py::arg("params"))
        .def("is_current", &Actor::is_current, "Whether all parameters are still where they were.")
        .def("act", &Actor::act, py::arg("observations"), py::arg("noise"),
             "(do,) -> (da,) or (n, do) -> (n, da), float32: the actions for this noise, a tensor of as many "
             "elements, or for None the mean actions.");
}

}  // namespace parl::bindings
