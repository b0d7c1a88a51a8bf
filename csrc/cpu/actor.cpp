#include "cpu/actor.h"

#include "cpu/simd.h"
#include "math/squashed_gaussian.h"

namespace parl::cpu::PARL_ISA {
namespace {

// Outputs computed side by side, which hides the latency of the additions.
constexpr int kGroup = 4;

// out[j] = bias[j] + weight[j] · x for kCount outputs.
template <int kCount, typename T>
PARL_INLINE void dot_products(const T* weight, const T* bias, std::int64_t inputs, const T* x, T* out) {
    using V = Vec<T>;
    const std::int64_t whole = inputs / V::kWidth * V::kWidth;
    const int rest = static_cast<int>(inputs - whole);
    V sums[kCount];
    for (V& sum : sums) sum = V(T(0));
    for (std::int64_t i = 0; i < whole; i += V::kWidth) {
        const V values = V::load(x + i);
        for (int j = 0; j < kCount; ++j) sums[j] += V::load(weight + j * inputs + i) * values;
    }
    if (rest > 0) {
        const V values = V::load_partial(x + whole, rest);
        for (int j = 0; j < kCount; ++j)
            sums[j] += V::load_partial(weight + j * inputs + whole, rest) * values;
    }
    for (int j = 0; j < kCount; ++j) out[j] = bias[j] + sums[j].sum();
}

}  // namespace

template <typename T>
void actor_act(const ActorLayer<T>* layers, int num_layers, const T* observation, const T* noise, T* scratch,
               T* action) {
    std::int64_t widest = 0;
    for (int l = 0; l < num_layers; ++l) widest = widest < layers[l].outputs ? layers[l].outputs : widest;
    const T* x = observation;
    T* out = scratch;
    for (int l = 0; l < num_layers; ++l) {
        const ActorLayer<T>& layer = layers[l];
        out = scratch + (l % 2) * widest;
        std::int64_t j = 0;
        for (; j + kGroup <= layer.outputs; j += kGroup) {
            dot_products<kGroup>(layer.weight + j * layer.inputs, layer.bias + j, layer.inputs, x, out + j);
        }
        for (; j < layer.outputs; ++j) {
            dot_products<1>(layer.weight + j * layer.inputs, layer.bias + j, layer.inputs, x, out + j);
        }
        if (l < num_layers - 1) {
            for (std::int64_t i = 0; i < layer.outputs; ++i) out[i] = out[i] < T(0) ? T(0) : out[i];
        }
        x = out;
    }
    const std::int64_t act_dim = layers[num_layers - 1].outputs / 2;
    for (std::int64_t i = 0; i < act_dim; ++i) {
        action[i] = noise == nullptr ? math::tanh(out[i])
                                     : math::sample_squashed(out[i], out[act_dim + i], noise[i]).action;
    }
}

template void actor_act<float>(const ActorLayer<float>*, int, const float*, const float*, float*, float*);
template void actor_act<double>(const ActorLayer<double>*, int, const double*, const double*, double*,
                                double*);

}  // namespace parl::cpu::PARL_ISA
