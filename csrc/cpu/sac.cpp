// How one update is divided:
// 1. Every thread takes a share of the batch's rows, and blocks of these through all networks while they stay
//    in its cache: once for the critics' step, and, with the critics it has led to, once for the actor's.
// 2. Each has sums of parameter gradients of its own, added in the order of the threads.
// 3. Adam and the targets' average go over the parameters once, divided evenly.
#include "cpu/sac_networks.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "math/squashed_gaussian.h"

namespace parl::cpu::PARL_ISA {

using namespace sac;

namespace {

constexpr auto kRelu = Activation::kRelu;

template <typename T>
void copy_rows(std::int64_t rows, std::int64_t columns, const T* from, std::int64_t from_stride, T* to,
               std::int64_t to_stride) {
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = from[i * from_stride + j];
    }
}

struct Sums {
    double critic_loss = 0.0;
    double actor_loss = 0.0;
    double log_prob = 0.0;
};

// What one thread does with its rows of the batch.
template <typename T>
struct Worker {
    const SacState<T>& state;
    const SacRule& rule;
    const SacBatch<T>& batch;
    const Networks<T>& networks;
    const Scratch<T> s;
    const T temperature;
    Sums sums;

    std::int64_t pair_stride() const { return row_stride<T>(state.obs_dim + state.act_dim); }

    void forward(const Layer<T>* layers, const T* x, T* const* hidden, std::int64_t rows, T* out) const {
        mlp_forward<T>(layers, state.num_layers, kRelu, rows, x, hidden, nullptr, out);
    }

    void backward(const Layer<T>* layers, const T* x, T* const* hidden, std::int64_t rows, T* last_delta,
                  T* const* gradients, bool accumulate, T* input_gradient) const {
        T* deltas[kSacMaxLayers];
        for (int l = 0; l < state.num_layers - 1; ++l) deltas[l] = s.deltas[l];
        deltas[state.num_layers - 1] = last_delta;
        mlp_backward<T>(layers, state.num_layers, kRelu, rows, x, hidden, nullptr, deltas, gradients,
                        accumulate, input_gradient);
    }

    // The actor at `observations`: actions and what belongs to them, and the pairs of both.
    void act(const T* observations, std::int64_t stride, const T* noise, std::int64_t rows) const {
        constexpr int kWidth = Vec<T>::kWidth;
        const std::int64_t da = state.act_dim, out_stride = row_stride<T>(2 * da);
        copy_rows(rows, state.obs_dim, observations, stride, s.observations, row_stride<T>(state.obs_dim));
        forward(networks.actor, s.observations, s.actor_hidden, rows, s.actor_out);
        copy_rows(rows, da, s.actor_out, out_stride, s.mean, da);
        copy_rows(rows, da, s.actor_out + da, out_stride, s.raw, da);
        copy_rows(rows, da, noise, da, s.noise, da);
        for (std::int64_t i = 0; i < rows * da; i += kWidth) {
            const auto sample = math::sample_squashed(Vec<T>::load(s.mean + i), Vec<T>::load(s.raw + i),
                                                      Vec<T>::load(s.noise + i));
            sample.action.store(s.actions + i);
            sample.log_prob.store(s.log_prob_parts + i);
            sample.tanh_raw.store(s.tanh_raw + i);
            sample.spread.store(s.spread + i);
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            s.log_prob[i] = T(0);
            for (std::int64_t j = 0; j < da; ++j) s.log_prob[i] += s.log_prob_parts[i * da + j];
        }
        pair(observations, stride, s.actions, da, rows);
    }

    void pair(const T* observations, std::int64_t observations_stride, const T* actions,
              std::int64_t actions_stride, std::int64_t rows) const {
        copy_rows(rows, state.obs_dim, observations, observations_stride, s.pairs, pair_stride());
        copy_rows(rows, state.act_dim, actions, actions_stride, s.pairs + state.obs_dim, pair_stride());
    }

    void critic_step(std::int64_t first, std::int64_t rows, bool accumulate) {
        const std::int64_t stride = row_stride<T>(1);
        const T scale = T(2) / static_cast<T>(batch.rows), discount = static_cast<T>(rule.discount);
        act(batch.next_observations + first * batch.next_observations_stride, batch.next_observations_stride,
            batch.next_noise + first * state.act_dim, rows);
        for (int k = 0; k < 2; ++k) {
            forward(networks.target[k], s.pairs, s.critic_hidden[k], rows, s.values[k]);
        }
        T* const targets = s.log_prob;
        for (std::int64_t i = 0; i < rows; ++i) {
            const T value = smaller(s.values[0][i * stride], s.values[1][i * stride]);
            const T soft_value = value - temperature * s.log_prob[i];
            const T goes_on = T(1) - batch.terminated[(first + i) * batch.terminated_stride];
            targets[i] = batch.rewards[(first + i) * batch.rewards_stride] + discount * goes_on * soft_value;
        }
        pair(batch.observations + first * batch.observations_stride, batch.observations_stride,
             batch.actions + first * batch.actions_stride, batch.actions_stride, rows);
        for (int k = 0; k < 2; ++k) {
            forward(networks.critic[k], s.pairs, s.critic_hidden[k], rows, s.values[k]);
            for (std::int64_t i = 0; i < rows; ++i) {
                const T error = s.values[k][i * stride] - targets[i];
                sums.critic_loss += static_cast<double>(error) * static_cast<double>(error);
                s.value_delta[i * stride] = scale * error;
            }
            backward(networks.critic[k], s.pairs, s.critic_hidden[k], rows, s.value_delta,
                     s.critic_gradients[k], accumulate, nullptr);
        }
    }

    void actor_step(std::int64_t first, std::int64_t rows, bool accumulate) {
        constexpr int kWidth = Vec<T>::kWidth;
        const std::int64_t da = state.act_dim, stride = row_stride<T>(1), action_stride = row_stride<T>(da);
        const T share = T(1) / static_cast<T>(batch.rows);
        act(batch.observations + first * batch.observations_stride, batch.observations_stride,
            batch.noise + first * da, rows);
        for (int k = 0; k < 2; ++k) {
            forward(networks.critic[k], s.pairs, s.critic_hidden[k], rows, s.values[k]);
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            const T value = smaller(s.values[0][i * stride], s.values[1][i * stride]);
            sums.actor_loss += static_cast<double>(temperature * s.log_prob[i] - value);
            sums.log_prob += static_cast<double>(s.log_prob[i]);
        }
        for (int k = 0; k < 2; ++k) {
            // The gradient of the smaller value; where both are equal half goes to each, as in torch.
            for (std::int64_t i = 0; i < rows; ++i) {
                const T mine = s.values[k][i * stride], other = s.values[1 - k][i * stride];
                s.value_delta[i * stride] = -share * (mine < other ? T(1) : (other < mine ? T(0) : T(0.5)));
            }
            backward(networks.by_action[k], nullptr, s.critic_hidden[k], rows, s.value_delta, nullptr, false,
                     s.action_gradient[k]);
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < da; ++j) {
                const std::int64_t at = i * action_stride + j;
                s.mean[i * da + j] = s.action_gradient[0][at] + s.action_gradient[1][at];
            }
        }
        const Vec<T> by_log_prob(share * temperature);
        for (std::int64_t i = 0; i < rows * da; i += kWidth) {
            const auto gradient =
                math::squashed_gradient(Vec<T>::load(s.actions + i), Vec<T>::load(s.tanh_raw + i),
                                        Vec<T>::load(s.spread + i), Vec<T>::load(s.mean + i), by_log_prob);
            gradient.mean.store(s.mean + i);
            gradient.raw.store(s.raw + i);
        }
        const std::int64_t out_stride = row_stride<T>(2 * da);
        copy_rows(rows, da, s.mean, da, s.actor_delta, out_stride);
        copy_rows(rows, da, s.raw, da, s.actor_delta + da, out_stride);
        backward(networks.actor, s.observations, s.actor_hidden, rows, s.actor_delta, s.actor_gradients,
                 accumulate, nullptr);
    }

    // NaN if either is.
    static T smaller(T a, T b) { return a < b || a != a ? a : b; }
};

// The parameters of one optimiser, with the numbers of its next step.
template <typename T>
struct Optimizer {
    AdamTensor<T> tensors[2 * kSacMaxLayers + 1];
    int count = 0;
    std::int64_t size = 0;

    void add(const SacParam<T>& param, double learning_rate, const SacRule& rule) {
        const double step = static_cast<double>(*param.step) + 1.0;
        tensors[count++] = {
            param.value,   param.gradient,
            param.exp_avg, param.exp_avg_sq,
            param.size,    adam_step<T>(learning_rate, rule.beta1, rule.beta2, rule.epsilon, step)};
        size += param.size;
    }
};

PARL_INLINE void wait_for_all() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace

template <typename T>
std::int64_t sac_workspace(const SacState<T>& state, int num_threads) {
    Arena<T> shared{nullptr}, own{nullptr};
    place_networks(state, shared);
    place_scratch(state, own);
    return shared.used + num_threads * own.used;
}

template <typename T>
SacReport sac_update(const SacState<T>& state, const SacRule& rule, const SacBatch<T>& batch, T* workspace,
                     [[maybe_unused]] int num_threads) {
    Arena<T> shared{workspace}, counter{nullptr};
    const Networks<T> networks = place_networks(state, shared);
    place_scratch(state, counter);
    const std::int64_t own_size = counter.used;

    Optimizer<T> critics, actor;
    PolyakTensor<T> targets[2 * kSacMaxLayers];
    const int num_params = 2 * state.num_layers;
    for (int i = 0; i < num_params; ++i) {
        critics.add(state.critic[i], rule.critic_rate, rule);
        actor.add(state.actor[i], rule.actor_rate, rule);
        targets[i] = {state.target[i], state.critic[i].value, state.critic[i].size};
    }
    actor.add(state.log_temperature, rule.temperature_rate, rule);
    const T temperature = math::exp(*state.log_temperature.value);
    Sums sums[kSacMaxThreads];

#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
#endif
    {
        int me = 0, parts = 1;
#ifdef _OPENMP
        me = omp_get_thread_num();
        parts = omp_get_num_threads();
#endif
        Arena<T> own{workspace + shared.used + me * own_size};
        Worker<T> worker{state, rule, batch, networks, place_scratch(state, own), temperature, {}};
        const std::int64_t begin = me * batch.rows / parts, end = (me + 1) * batch.rows / parts;
        const std::int64_t blocks = (end - begin + kBlockRows - 1) / kBlockRows;
        const auto for_each_block = [&](auto step) {
            for (std::int64_t block = 0; block < blocks; ++block) {
                const std::int64_t first = begin + block * (end - begin) / blocks;
                step(first, begin + (block + 1) * (end - begin) / blocks - first, block > 0);
            }
        };
        const auto gather = [&](const Layer<T>& layer, T* mine, WeightLayout layout, T* weight, T* bias) {
            const T* all[kSacMaxThreads];
            for (int p = 0; p < parts; ++p) all[p] = mine + (p - me) * own_size;
            gather_gradient(layer, all, parts, layout, weight, bias, me, parts);
        };
        const auto step = [&](const Optimizer<T>& optimizer) {
            adam_range(optimizer.tensors, optimizer.count, me * optimizer.size / parts,
                       (me + 1) * optimizer.size / parts);
        };

        pack_actor_and_targets(state, networks, me, parts);
        pack_critics(state, networks, me, parts);
        wait_for_all();
        for_each_block([&](auto... arguments) { worker.critic_step(arguments...); });
        wait_for_all();
        for (int l = 0; l < state.num_layers; ++l) {
            const SacParam<T>&weight = state.critic[2 * l], &bias = state.critic[2 * l + 1];
            for (int k = 0; k < 2; ++k) {
                gather(networks.critic[k][l], worker.s.critic_gradients[k][l], WeightLayout::kInOut,
                       weight.gradient + k * weight.size / 2, bias.gradient + k * bias.size / 2);
            }
        }
        wait_for_all();
        step(critics);
        wait_for_all();
        pack_critics(state, networks, me, parts);
        if (rule.move_targets) {
            polyak_range(targets, num_params, static_cast<T>(rule.polyak), me * critics.size / parts,
                         (me + 1) * critics.size / parts);
        }
        wait_for_all();
        for_each_block([&](auto... arguments) { worker.actor_step(arguments...); });
        sums[me] = worker.sums;
        wait_for_all();
        for (int l = 0; l < state.num_layers; ++l) {
            gather(networks.actor[l], worker.s.actor_gradients[l], WeightLayout::kOutIn,
                   state.actor[2 * l].gradient, state.actor[2 * l + 1].gradient);
        }
        if (me == 0) {
            for (int p = 1; p < parts; ++p) {
                sums[0].critic_loss += sums[p].critic_loss;
                sums[0].actor_loss += sums[p].actor_loss;
                sums[0].log_prob += sums[p].log_prob;
            }
            const T entropy = static_cast<T>(-sums[0].log_prob / static_cast<double>(batch.rows));
            *state.log_temperature.gradient = temperature * (entropy - static_cast<T>(rule.target_entropy));
        }
        wait_for_all();
        step(actor);
    }
    for (int i = 0; i < num_params; ++i) {
        *state.critic[i].step += 1.0F;
        *state.actor[i].step += 1.0F;
    }
    *state.log_temperature.step += 1.0F;
    const double rows = static_cast<double>(batch.rows);
    return {sums[0].critic_loss / rows, sums[0].actor_loss / rows, -sums[0].log_prob / rows,
            static_cast<double>(temperature)};
}

#define PARL_INSTANTIATE(T)                                          \
    template std::int64_t sac_workspace<T>(const SacState<T>&, int); \
    template SacReport sac_update<T>(const SacState<T>&, const SacRule&, const SacBatch<T>&, T*, int);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cpu::PARL_ISA
