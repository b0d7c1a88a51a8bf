#include "cpu/sac.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu/threads.h"
#include "tensor_view.h"
#include "workspace.h"

namespace parl::bindings {
namespace {

struct Rows {
    const void* data;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t stride;

    template <typename T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

// A tensor (rows, columns) or (rows,), its rows any distance apart.
template <typename T>
Rows view_rows(py::handle tensor, const char* name, std::int64_t rows, std::int64_t columns) {
    require_tensor(tensor, name);
    const TorchNames& torch = torch_names();
    const py::tuple shape(attribute(tensor, torch.shape));
    const py::tuple strides(call(tensor, torch.stride));
    const std::size_t dims = columns == 0 ? 1 : 2;
    const std::string expected = columns == 0
                                     ? "(" + std::to_string(rows) + ",)"
                                     : "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
    if (attribute(tensor, torch.dtype).ptr() != (sizeof(T) == 4 ? torch.float32 : torch.float64)) {
        throw py::type_error(std::string(name) + " must have the dtype of the networks, got " +
                             std::string(py::str(attribute(tensor, torch.dtype))));
    }
    if (attribute(tensor, torch.is_cpu).ptr() != Py_True) {
        throw py::type_error(std::string(name) + " must be on the CPU");
    }
    if (shape.size() != dims || shape[0].cast<std::int64_t>() != rows ||
        (dims == 2 && shape[1].cast<std::int64_t>() != columns)) {
        throw py::value_error(std::string(name) + " must be of shape " + expected + ", got " +
                              std::string(py::str(shape)));
    }
    if (dims == 2 && columns > 1 && strides[1].cast<std::int64_t>() != 1) {
        throw py::value_error(std::string(name) + " must have contiguous rows");
    }
    return {PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr()), rows, columns,
            strides[0].cast<std::int64_t>()};
}

template <typename T>
class Sac {
  public:
    // `actor`, `critic`: parameters with their gradients, averages and steps, five lists each; `temperature`
    // the same for one tensor.
    Sac(std::int64_t obs_dim, std::int64_t act_dim, const std::vector<std::int64_t>& hidden,
        const py::tuple& actor, const py::tuple& critic, const py::list& target,
        const py::tuple& temperature) {
        if (obs_dim < 1) throw py::value_error("obs_dim must be at least 1, got " + std::to_string(obs_dim));
        if (act_dim < 1) throw py::value_error("act_dim must be at least 1, got " + std::to_string(act_dim));
        if (hidden.size() >= cpu::kSacMaxLayers) {
            throw py::value_error("hidden must have fewer than " + std::to_string(cpu::kSacMaxLayers) +
                                  " layers, got " + std::to_string(hidden.size()));
        }
        state_.obs_dim = obs_dim;
        state_.act_dim = act_dim;
        state_.num_layers = static_cast<int>(hidden.size()) + 1;
        std::copy(hidden.begin(), hidden.end(), state_.hidden);
        std::vector<std::int64_t> actor_sizes, critic_sizes;
        for (int l = 0; l < state_.num_layers; ++l) {
            const bool is_last = l == state_.num_layers - 1;
            const std::int64_t before = l == 0 ? 0 : state_.hidden[l - 1];
            if (!is_last && state_.hidden[l] < 1) throw py::value_error("hidden must be positive");
            const std::int64_t actor_in = l == 0 ? obs_dim : before;
            const std::int64_t critic_in = l == 0 ? obs_dim + act_dim : before;
            const std::int64_t actor_out = is_last ? 2 * act_dim : state_.hidden[l];
            const std::int64_t critic_out = is_last ? 1 : state_.hidden[l];
            actor_sizes.insert(actor_sizes.end(), {actor_in * actor_out, actor_out});
            critic_sizes.insert(critic_sizes.end(), {2 * critic_in * critic_out, 2 * critic_out});
        }
        take(actor, actor_sizes, "actor", state_.actor);
        take(critic, critic_sizes, "critic", state_.critic);
        take(temperature, {1}, "temperature", &state_.log_temperature);
        if (target.size() != critic_sizes.size()) {
            throw py::value_error("target must have " + std::to_string(critic_sizes.size()) +
                                  " tensors, got " + std::to_string(target.size()));
        }
        for (std::size_t i = 0; i < critic_sizes.size(); ++i) {
            state_.target[i] = static_cast<T*>(hold(target[i], kDTypeOf<T>, critic_sizes[i], "target"));
        }
    }

    // Whether all tensors are still where they were.
    bool is_current() const {
        for (const Held& held : held_) {
            if (PyLong_AsVoidPtr(call(held.tensor, torch_names().data_ptr).ptr()) != held.data) return false;
        }
        return true;
    }

    py::tuple update(const py::tuple& batch, py::handle next_noise, py::handle noise,
                     const cpu::SacRule& rule, int num_threads) {
        if (batch.size() < 5) throw py::value_error("batch must have five tensors or more");
        check_threads(num_threads);
        require_tensor(batch[2], "rewards");
        const auto rows = call(batch[2], torch_names().numel).cast<std::int64_t>();
        if (rows < 1) throw py::value_error("batch must have at least one row");
        const std::int64_t obs_dim = state_.obs_dim, act_dim = state_.act_dim;
        const Rows observations = view_rows<T>(batch[0], "observations", rows, obs_dim);
        const Rows actions = view_rows<T>(batch[1], "actions", rows, act_dim);
        const Rows rewards = view_rows<T>(batch[2], "rewards", rows, 0);
        const Rows next_observations = view_rows<T>(batch[3], "next_observations", rows, obs_dim);
        const Rows terminated = view_rows<T>(batch[4], "terminated", rows, 0);
        const TensorView next_draws = view_contiguous(next_noise, "next_noise"),
                         draws = view_contiguous(noise, "noise");
        require(next_draws, kDTypeOf<T>, rows * act_dim, "next_noise");
        require(draws, kDTypeOf<T>, rows * act_dim, "noise");
        const cpu::SacBatch<T> views{rows,
                                     observations.as<T>(),
                                     observations.stride,
                                     actions.as<T>(),
                                     actions.stride,
                                     rewards.as<T>(),
                                     rewards.stride,
                                     next_observations.as<T>(),
                                     next_observations.stride,
                                     terminated.as<T>(),
                                     terminated.stride,
                                     next_draws.as<T>(),
                                     draws.as<T>()};
        const int threads = threads_for(rows, num_threads);
        cpu::SacReport report;
        {
            const py::gil_scoped_release release;
            const std::lock_guard lock(mutex_);
            T* const workspace = workspace_.resize(PARL_DISPATCH(sac_workspace(state_, threads)), {threads});
            report = PARL_DISPATCH(sac_update(state_, rule, views, workspace, threads));
        }
        return py::make_tuple(report.critic_loss, report.actor_loss, report.entropy, report.temperature);
    }

  private:
    // As many threads as have enough to do: each member of critics and targets is gone through six times,
    // half of it backwards, the actor four times.
    int threads_for(std::int64_t rows, int num_threads) const {
        std::int64_t params = 0;
        for (int i = 0; i < 2 * state_.num_layers; ++i)
            params += 4 * state_.actor[i].size + 6 * state_.critic[i].size;
        return cpu::threads_worth(static_cast<double>(rows * params),
                                  std::min<std::int64_t>({rows, num_threads, cpu::kSacMaxThreads}));
    }

    struct Held {
        py::object tensor;
        void* data;
    };

    void* hold(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
        const TensorView view = view_contiguous(tensor, name);
        require(view, dtype, size, name);
        held_.push_back({py::reinterpret_borrow<py::object>(tensor), view.data});
        return view.data;
    }

    void take(const py::tuple& lists, const std::vector<std::int64_t>& sizes, const char* name,
              cpu::SacParam<T>* params) {
        if (lists.size() != 5) throw py::value_error(std::string(name) + " must be five lists");
        for (const py::handle list : lists) {
            if (py::len(list) != sizes.size()) {
                throw py::value_error(std::string(name) + " must have " + std::to_string(sizes.size()) +
                                      " tensors in each list, got " + std::to_string(py::len(list)));
            }
        }
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            const auto tensor = [&](std::size_t which) { return py::object(py::list(lists[which])[i]); };
            const auto values = [&](std::size_t which) {
                return static_cast<T*>(hold(tensor(which), kDTypeOf<T>, sizes[i], name));
            };
            params[i] = {values(0), values(1), values(2), values(3), nullptr, sizes[i]};
            params[i].step = static_cast<float*>(hold(tensor(4), DType::kFloat32, 1, name));
        }
    }

    cpu::SacState<T> state_{};
    std::vector<Held> held_;
    Workspace<T> workspace_;
    std::mutex mutex_;  // one update at a time: each works in the workspace and in the networks
};

template <typename T>
void bind(py::module_& module, const char* name) {
    py::class_<Sac<T>>(module, name)
        .def(py::init<std::int64_t, std::int64_t, const std::vector<std::int64_t>&, const py::tuple&,
                      const py::tuple&, const py::list&, const py::tuple&>(),
             py::arg("obs_dim"), py::arg("act_dim"), py::arg("hidden"), py::arg("actor"), py::arg("critic"),
             py::arg("target"), py::arg("temperature"))
        .def("is_current", &Sac<T>::is_current)
        .def("update", &Sac<T>::update, py::arg("batch"), py::arg("next_noise"), py::arg("noise"),
             py::arg("rule"), py::arg("num_threads"),
             "One update in place: the critic loss, actor loss, entropy and temperature.");
}

}  // namespace

void bind_sac(py::module_& module) {
    py::class_<cpu::SacRule>(module, "SacRule")
        .def(py::init([](double discount, double polyak, bool move_targets, double target_entropy,
                         double actor_rate, double critic_rate, double temperature_rate, double beta1,
                         double beta2, double epsilon) {
                 return cpu::SacRule{discount,    polyak,           move_targets, target_entropy, actor_rate,
                                     critic_rate, temperature_rate, beta1,        beta2,          epsilon};
             }),
             py::arg("discount"), py::arg("polyak"), py::arg("move_targets"), py::arg("target_entropy"),
             py::arg("actor_rate"), py::arg("critic_rate"), py::arg("temperature_rate"), py::arg("beta1"),
             py::arg("beta2"), py::arg("epsilon"));
    bind<float>(module, "SacFloat32");
    bind<double>(module, "SacFloat64");
}

}  // namespace parl::bindings
