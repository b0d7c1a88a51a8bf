// The networks of soft actor-critic as the update works with them, and the memory it works in.
#pragma once

#include "cpu/arena.h"
#include "cpu/mlp.h"
#include "cpu/sac.h"

namespace parl::cpu::PARL_ISA::sac {

// Rows that pass through the layers at once.
inline constexpr std::int64_t kBlockRows = 128;

template <typename T>
std::int64_t inputs_of(const SacState<T>& state, int layer, bool is_critic) {
    if (layer > 0) return state.hidden[layer - 1];
    return state.obs_dim + (is_critic ? state.act_dim : 0);
}

template <typename T>
std::int64_t outputs_of(const SacState<T>& state, int layer, bool is_critic) {
    if (layer < state.num_layers - 1) return state.hidden[layer];
    return is_critic ? 1 : 2 * state.act_dim;
}

// The packed parameters, shared by all threads.
template <typename T>
struct Networks {
    Layer<T> actor[kSacMaxLayers];
    Layer<T> critic[2][kSacMaxLayers];
    Layer<T> target[2][kSacMaxLayers];
    Layer<T> by_action[2][kSacMaxLayers];  // the critics as functions of the action, for going backwards
};

template <typename T>
Networks<T> place_networks(const SacState<T>& state, Arena<T>& arena) {
    Networks<T> networks;
    const auto place = [&](int layer, bool is_critic) {
        const std::int64_t inputs = inputs_of(state, layer, is_critic);
        const std::int64_t outputs = outputs_of(state, layer, is_critic);
        T* const memory = arena.take(layer_size<T>(inputs, outputs));
        return memory == nullptr ? Layer<T>{} : layer_at(memory, inputs, outputs);
    };
    for (int l = 0; l < state.num_layers; ++l) {
        networks.actor[l] = place(l, false);
        for (int k = 0; k < 2; ++k) {
            networks.critic[k][l] = place(l, true);
            networks.target[k][l] = place(l, true);
            networks.by_action[k][l] = networks.critic[k][l];
        }
    }
    const std::int64_t outputs = outputs_of(state, 0, true);
    for (auto& layers : networks.by_action) {
        layers[0] = {state.act_dim, outputs, nullptr, arena.take(packed_size<T>(outputs, state.act_dim)),
                     nullptr};
    }
    return networks;
}

// What one thread works in. Matrices hold kBlockRows rows, the flat arrays of actions row after row.
template <typename T>
struct Scratch {
    T* observations;
    T* pairs;  // observations and actions side by side
    T* actor_hidden[kSacMaxLayers];
    T* actor_out;
    T* critic_hidden[2][kSacMaxLayers];
    T* values[2];
    T* deltas[kSacMaxLayers];  // of all layers but the last, of actor and critics alike
    T* actor_delta;
    T* value_delta;
    T* action_gradient[2];
    T* mean;
    T* raw;
    T* noise;
    T* actions;
    T* log_prob_parts;
    T* tanh_raw;
    T* spread;
    T* log_prob;
    T* actor_gradients[kSacMaxLayers];
    T* critic_gradients[2][kSacMaxLayers];
};

template <typename T>
Scratch<T> place_scratch(const SacState<T>& state, Arena<T>& arena) {
    Scratch<T> s;
    const auto matrix = [&](std::int64_t columns) { return arena.take(kBlockRows * row_stride<T>(columns)); };
    const auto flat = [&] { return arena.take(kBlockRows * state.act_dim + Vec<T>::kWidth); };
    s.observations = matrix(state.obs_dim);
    s.pairs = matrix(state.obs_dim + state.act_dim);
    for (int l = 0; l < state.num_layers - 1; ++l) {
        s.actor_hidden[l] = matrix(state.hidden[l]);
        for (auto& hidden : s.critic_hidden) hidden[l] = matrix(state.hidden[l]);
        s.deltas[l] = matrix(state.hidden[l]);
    }
    s.actor_out = matrix(2 * state.act_dim);
    s.actor_delta = matrix(2 * state.act_dim);
    for (T*& values : s.values) values = matrix(1);
    s.value_delta = matrix(1);
    for (T*& gradient : s.action_gradient) gradient = matrix(state.act_dim);
    T** const arrays[] = {&s.mean, &s.raw, &s.noise, &s.actions, &s.log_prob_parts, &s.tanh_raw, &s.spread};
    for (T** const array : arrays) *array = flat();
    s.log_prob = arena.take(kBlockRows);
    for (int l = 0; l < state.num_layers; ++l) {
        const auto gradient = [&](bool is_critic) {
            return arena.take(
                gradient_size<T>(inputs_of(state, l, is_critic), outputs_of(state, l, is_critic)));
        };
        s.actor_gradients[l] = gradient(false);
        for (auto& gradients : s.critic_gradients) gradients[l] = gradient(true);
    }
    return s;
}

template <typename T>
void pack_critics(const SacState<T>& state, const Networks<T>& networks, int part, int parts) {
    for (int l = 0; l < state.num_layers; ++l) {
        const SacParam<T>&weight = state.critic[2 * l], &bias = state.critic[2 * l + 1];
        for (int k = 0; k < 2; ++k) {
            pack_layer(networks.critic[k][l], weight.value + k * weight.size / 2,
                       bias.value + k * bias.size / 2, WeightLayout::kInOut, l > 0, part, parts);
        }
    }
    if (part > 0) return;
    const std::int64_t outputs = outputs_of(state, 0, true);
    constexpr std::int64_t kColumns = kPanelColumns<T>;
    for (int k = 0; k < 2; ++k) {
        const T* const weight = state.critic[0].value + k * state.critic[0].size / 2;
        pack(weight + state.obs_dim * outputs, outputs, true, outputs, state.act_dim, 0,
             (state.act_dim + kColumns - 1) / kColumns, networks.by_action[k][0].backward);
    }
}

template <typename T>
void pack_actor_and_targets(const SacState<T>& state, const Networks<T>& networks, int part, int parts) {
    for (int l = 0; l < state.num_layers; ++l) {
        pack_layer(networks.actor[l], state.actor[2 * l].value, state.actor[2 * l + 1].value,
                   WeightLayout::kOutIn, l > 0, part, parts);
        for (int k = 0; k < 2; ++k) {
            pack_layer(networks.target[k][l], state.target[2 * l] + k * state.critic[2 * l].size / 2,
                       state.target[2 * l + 1] + k * state.critic[2 * l + 1].size / 2, WeightLayout::kInOut,
                       false, part, parts);
        }
    }
}

}  // namespace parl::cpu::PARL_ISA::sac
