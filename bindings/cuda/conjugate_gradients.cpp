#include "cuda/conjugate_gradients.h"

#include <array>
#include <limits>
#include <memory>

#include "device_tensor.h"
#include "module.h"

namespace parl::bindings::cuda {
namespace {

// The memory of one solve, whose tensors are held as long as this lives.
class ConjugateGradients {
  public:
    ConjugateGradients(py::object rhs, py::object x, py::object residual, py::object direction,
                       py::object history, py::object reals, py::object words, py::object partials,
                       double rtol, int patience)
        : tensors_{rhs, x, residual, direction, history, reals, words, partials},
          rhs_(view_device(rhs, "rhs")),
          x_(like_rhs(x, "x")),
          residual_(like_rhs(residual, "residual")),
          direction_(like_rhs(direction, "direction")),
          history_(view_device(history, "history")),
          reals_(view_device(reals, "reals")),
          words_(view_device(words, "words")),
          partials_(view_device(partials, "partials")),
          rtol_(rtol),
          patience_(patience) {
        if (rhs_.dtype != DType::kFloat32 && rhs_.dtype != DType::kFloat64) {
            throw py::type_error(std::string("rhs must be float32 or float64, got ") +
                                 dtype_name(rhs_.dtype));
        }
        require(history_, "history", rhs_.dtype, history_.size, rhs_, "rhs");
        require(reals_, "reals", rhs_.dtype, parl::cuda::kNumReals, rhs_, "rhs");
        require(words_, "words", DType::kInt32, parl::cuda::kNumWords, rhs_, "rhs");
        require(partials_, "partials", DType::kFloat64, parl::cuda::kNumPartials, rhs_, "rhs");
        if (history_.size < 1 || history_.size > std::numeric_limits<int>::max()) {
            throw py::value_error("history must have 1 to 2^31 - 1 elements, got " +
                                  std::to_string(history_.size));
        }
        if (!(rtol > 0)) throw py::value_error("rtol must be positive, got " + std::to_string(rtol));
        if (patience < 1)
            throw py::value_error("patience must be at least 1, got " + std::to_string(patience));
        const std::array<const DeviceTensor*, 3> written{&x_, &residual_, &direction_};
        const std::array<const char*, 3> names{"x", "residual", "direction"};
        for (std::size_t i = 0; i < written.size(); ++i) {
            require_disjoint(*written[i], names[i], rhs_, "rhs");
            for (std::size_t j = 0; j < i; ++j)
                require_disjoint(*written[i], names[i], *written[j], names[j]);
        }
    }

    void start(py::handle residual, std::uintptr_t stream) const {
        const DeviceTensor view = like_rhs(residual, "start");
        const OnDevice device(rhs_);
        if (rhs_.dtype == DType::kFloat32) {
            parl::cuda::cg_start(solve<float>(), view.as<const float>(), stream_of(stream));
        } else {
            parl::cuda::cg_start(solve<double>(), view.as<const double>(), stream_of(stream));
        }
    }

    void step(py::handle image, std::uintptr_t stream) const {
        const DeviceTensor view = like_rhs(image, "image");
        const OnDevice device(rhs_);
        if (rhs_.dtype == DType::kFloat32) {
            parl::cuda::cg_step(solve<float>(), view.as<const float>(), stream_of(stream));
        } else {
            parl::cuda::cg_step(solve<double>(), view.as<const double>(), stream_of(stream));
        }
    }

    void check(py::handle image, std::uintptr_t stream) const {
        const DeviceTensor view = like_rhs(image, "image");
        const OnDevice device(rhs_);
        if (rhs_.dtype == DType::kFloat32) {
            parl::cuda::cg_check(solve<float>(), view.as<const float>(), stream_of(stream));
        } else {
            parl::cuda::cg_check(solve<double>(), view.as<const double>(), stream_of(stream));
        }
    }

  private:
    DeviceTensor like_rhs(py::handle tensor, const char* name) const {
        const DeviceTensor view = view_device(tensor, name);
        require_like(view, name, rhs_, "rhs");
        return view;
    }

    template <typename T>
    parl::cuda::CgSolve<T> solve() const {
        return {rhs_.size,
                rhs_.as<const T>(),
                x_.as<T>(),
                residual_.as<T>(),
                direction_.as<T>(),
                history_.as<T>(),
                reals_.as<T>(),
                words_.as<int>(),
                partials_.as<double>(),
                rtol_,
                static_cast<int>(history_.size - 1),
                patience_};
    }

    std::array<py::object, 8> tensors_;
    DeviceTensor rhs_, x_, residual_, direction_, history_, reals_, words_, partials_;
    double rtol_;
    int patience_;
};

}  // namespace

void bind_conjugate_gradients(py::module_& module) {
    py::class_<ConjugateGradients> solve(
        module, "ConjugateGradients", py::module_local(),
        "What conjugate gradients do between two products: see parl_core.hypergrad.solvers.cuda_cg.");
    solve.def(py::init<py::object, py::object, py::object, py::object, py::object, py::object, py::object,
                       py::object, double, int>(),
              py::arg("rhs"), py::arg("x"), py::arg("residual"), py::arg("direction"), py::arg("history"),
              py::arg("reals"), py::arg("words"), py::arg("partials"), py::arg("rtol"), py::arg("patience"));
    solve.def("start", &ConjugateGradients::start, py::arg("residual"), py::arg("stream"),
              "Begin at x, whose true residual is given.");
    solve.def("step", &ConjugateGradients::step, py::arg("image"), py::arg("stream"),
              "One iteration, with the product of the direction.");
    solve.def("check", &ConjugateGradients::check, py::arg("image"), py::arg("stream"),
              "Look at the true residual, with the product of x.");
    solve.attr("num_reals") = static_cast<int>(parl::cuda::kNumReals);
    solve.attr("num_words") = static_cast<int>(parl::cuda::kNumWords);
    solve.attr("num_partials") = static_cast<int>(parl::cuda::kNumPartials);
}

}  // namespace parl::bindings::cuda
