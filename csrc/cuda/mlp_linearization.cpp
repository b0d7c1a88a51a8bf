#include "cuda/mlp_linearization.h"

#include <algorithm>

#include "cuda/launch.h"

namespace parl::cuda {

using math::Head;

template <typename T>
MlpLinearization<T>::MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, Arena<T> arena)
    : trajectories_(steps.trajectories), params_(policy.params), observations_(steps.observations) {
    const std::int64_t num_steps = trajectories_.num_steps, outputs = policy.widths[policy.num_layers];
    network_ = network_of(policy.widths, policy.num_layers, policy.activation,
                          policy.head == Head::kGaussianGlobal ? outputs : 0);
    workspace_ = arena.take(Blas::workspace_bytes() / static_cast<std::int64_t>(sizeof(T)));
    log_prob_ = arena.take(num_steps);

    std::int64_t widest = 0;
    const bool from_value = !keeps_slopes(policy.activation);
    for (int l = 0; l < network_.num_layers; ++l) {
        const std::int64_t width = policy.widths[l + 1], cells = num_steps * width;
        cotangents_.layers[l] = {arena.take(cells), width};
        if (l > 0) {
            packed_.forward[l] = arena.take(2 * width * policy.widths[l]);
            packed_.backward[l] = arena.take(2 * width * policy.widths[l]);
        }
        if (l == network_.num_layers - 1) break;
        hidden_[l] = {width, arena.take(2 * cells), nullptr, nullptr};
        if (!from_value) {
            hidden_[l].slopes = arena.take(cells);
            hidden_[l].bends = arena.take(cells);
        }
        widest = std::max(widest, width);
    }

    head_.kind = policy.head;
    head_.squash = policy.squash;
    head_.num_steps = num_steps;
    head_.outputs = outputs;
    head_.action_dim = policy.head == Head::kGaussianState ? outputs / 2 : outputs;
    head_.output = arena.take(num_steps * outputs);
    head_.gradient = arena.take(num_steps * outputs);
    head_.indices = steps.indices;
    head_.actions = steps.actions;
    head_.log_std = policy.head == Head::kGaussianGlobal ? policy.params : policy.log_std;
    if (head_.is(Head::kGaussianGlobal)) head_.log_std_gradient = arena.take(num_steps * outputs);
    if (head_.is(Head::kCategorical)) head_.probabilities = arena.take(num_steps * outputs);
    if (head_.squash) head_.unsquashed = arena.take(num_steps * head_.action_dim);

    output_tangent_ = arena.take(num_steps * outputs);
    products_ = arena.take(num_steps * widest);
    along_ = arena.take(num_steps);
    steps_ = arena.take(num_steps);
    means_ = arena.take(num_steps);
    sums_ = arena.take(row_blocks(num_steps) * network_.num_columns);
    memory_size_ = arena.used();
}

template <typename T>
std::int64_t MlpLinearization<T>::memory_size(const Policy<T>& policy, const Steps<T>& steps) {
    return MlpLinearization(policy, steps, Arena<T>(nullptr)).memory_size_;
}

template <typename T>
MlpLinearization<T>::MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, bool allow_tf32,
                                      T* memory, cudaStream_t stream)
    : MlpLinearization(policy, steps, Arena<T>(memory)) {
    allow_tf32_ = allow_tf32;
    if (num_steps() == 0) return;
    pack_weights(network_, params_, false, true, packed_, T(0), static_cast<T*>(nullptr), stream);
    forward(blas(stream), stream);
}

template <typename T>
Matrix<const T> MlpLinearization<T>::input(int l) const {
    if (l == 0) return {observations_, network_.layers[0].inputs};
    const Matrix<T> activations = hidden_[l - 1].activations();
    return {activations.data, activations.stride};
}

template <typename T>
Partials<T> MlpLinearization<T>::log_std_sums() const {
    return {sums_ + network_.num_columns - network_.free_log_std, network_.num_columns};
}

template <typename T>
OutputTangent<T> MlpLinearization<T>::output_tangent(const T* v) const {
    return {output_tangent_, v + network_.last().bias(), v};
}

template <typename T>
void MlpLinearization<T>::forward(const Blas& blas, cudaStream_t stream) const {
    const int last = network_.num_layers - 1;
    for (int l = 0; l <= last; ++l) {
        const LayerShape& layer = network_.layers[l];
        const Matrix<T> out = l == last ? Matrix<T>{head_.output, layer.outputs} : hidden_[l].activations();
        blas.multiply_by_transposed(num_steps(), layer.outputs, layer.inputs, input(l),
                                    Matrix<const T>{weight(l), layer.inputs}, out);
        if (l == last) break;
        activate(network_.activation, num_steps(), hidden_[l], params_ + layer.bias(), stream);
    }
    start_head(head_, params_ + network_.last().bias(), log_prob_, stream);
}

template <typename T>
void MlpLinearization<T>::tangent_forward(const Blas& blas, const T* v, T* const* bends,
                                          const Cotangents* bent, cudaStream_t stream) const {
    const int last = network_.num_layers - 1;
    for (int l = 0; l <= last; ++l) {
        const LayerShape& layer = network_.layers[l];
        const Matrix<T> out = l == last ? Matrix<T>{output_tangent_, layer.outputs} : hidden_[l].tangents();
        if (l == 0) {
            blas.multiply_by_transposed(num_steps(), layer.outputs, layer.inputs, input(0),
                                        Matrix<const T>{v + layer.weight, layer.inputs}, out);
        } else {
            const std::int64_t both = 2 * layer.inputs;
            blas.multiply_by_transposed(num_steps(), layer.outputs, both, input(l),
                                        Matrix<const T>{packed_.forward[l], both}, out);
        }
        if (l == last) break;
        tangent_layer(network_.activation, num_steps(), hidden_[l], v + layer.bias(),
                      bends == nullptr ? static_cast<const T*>(nullptr) : bends[l],
                      bends == nullptr ? Matrix<T>{} : bent->layers[l], stream);
    }
}

template <typename T>
void MlpLinearization<T>::backward(const Blas& blas, const Cotangents& cotangents, const Shift<T>& shift,
                                   T* out, cudaStream_t stream) const {
    const bool kept = cotangents.has_kept;
    for (int l = network_.num_layers - 1; l >= 0; --l) {
        const LayerShape& layer = network_.layers[l];
        const Matrix<const T> delta{cotangents.layers[l].data, cotangents.layers[l].stride};
        if (out != nullptr && kept && l > 0) {
            // Rows take turns: δ̇ with a, δ with ȧ.
            blas.multiply_transposed(layer.outputs, layer.inputs, 2 * num_steps(),
                                     Matrix<const T>{delta.data, layer.outputs},
                                     Matrix<const T>{input(l).data, layer.inputs},
                                     Matrix<T>{out + layer.weight, layer.inputs}, shift.scale != T(0));
        } else if (out != nullptr) {
            blas.multiply_transposed(layer.outputs, layer.inputs, num_steps(), delta, input(l),
                                     Matrix<T>{out + layer.weight, layer.inputs}, shift.scale != T(0));
        }
        if (l == 0) break;
        blas.multiply(num_steps(), layer.inputs, kept ? 2 * layer.outputs : layer.outputs, delta,
                      Matrix<const T>{kept ? packed_.backward[l] : weight(l), layer.inputs},
                      Matrix<T>{products_, layer.inputs});
        backward_layer(network_.activation, num_steps(), hidden_[l - 1], products_, kept,
                       cotangents.layers[l - 1], sums(l - 1), stream);
    }
    if (out != nullptr) {
        finish_gradient(network_, num_steps(), static_cast<const T*>(sums_), shift, out, stream);
    }
}

template <typename T>
void MlpLinearization<T>::copy_log_prob(T* out, cudaStream_t stream) const {
    scale_vector(num_steps(), static_cast<const T*>(log_prob_), T(1), out, stream);
}

template <typename T>
void MlpLinearization<T>::jvp(const T* v, T* out, cudaStream_t stream) const {
    if (num_steps() == 0) return;
    pack_weights(network_, v, true, false, packed_, T(0), static_cast<T*>(nullptr), stream);
    tangent_forward(blas(stream), v, nullptr, nullptr, stream);
    head_along(head_, output_tangent(v), out, static_cast<T*>(nullptr), stream);
}

template <typename T>
void MlpLinearization<T>::vjp(const T* w, T* out, cudaStream_t stream) const {
    if (num_steps() == 0)
        return scale_vector(num_params(), static_cast<const T*>(nullptr), T(0), out, stream);
    const int last = network_.num_layers - 1;
    head_cotangent(head_, static_cast<const HeadCurvature<T>*>(nullptr), OutputTangent<T>{},
                   static_cast<const T*>(nullptr), w, cotangents_.layers[last], sums(last), log_std_sums(),
                   stream);
    backward(blas(stream), cotangents_, Shift<T>{}, out, stream);
}

template <typename T>
void MlpLinearization<T>::scores(const T* w, T* out, cudaStream_t stream) const {
    const int last = network_.num_layers - 1;
    if (num_steps() > 0) {
        head_cotangent(head_, static_cast<const HeadCurvature<T>*>(nullptr), OutputTangent<T>{},
                       static_cast<const T*>(nullptr), w, cotangents_.layers[last], sums(last),
                       log_std_sums(), stream);
        backward(blas(stream), cotangents_, Shift<T>{}, nullptr, stream);
    }
    ScoreFactors<T> factors{};
    for (int l = 0; l <= last; ++l) {
        factors.deltas[l] = {cotangents_.layers[l].data, cotangents_.layers[l].stride};
        factors.inputs[l] = input(l);
    }
    factors.steps = w;
    factors.log_std_gradient = head_.log_std_gradient;
    write_scores(network_, trajectories_, factors, out, stream);
}

template class MlpLinearization<float>;
template class MlpLinearization<double>;

}  // namespace parl::cuda
