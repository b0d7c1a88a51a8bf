#include "cuda/launch.h"
#include "cuda/mlp_linearization.h"

namespace parl::cuda {

using math::Head;

template <typename T>
MlpCurvature<T>::MlpCurvature(const MlpLinearization<T>& linearization, const Terms<T>& terms, Arena<T> arena)
    : linearization_(linearization),
      damping_(terms.damping),
      has_hessian_(terms.hessian != nullptr),
      has_curvature_(terms.hessian != nullptr || terms.fisher != nullptr),
      cotangents_(linearization.cotangents_) {
    const std::int64_t num_steps = linearization.num_steps();
    const PolicyHead<T>& head = linearization.head_;
    const std::int64_t cells = num_steps * head.outputs;
    if (has_curvature_ && head.is(Head::kCategorical)) {
        head_.weights = arena.take(num_steps);
    } else if (has_curvature_) {
        head_.diagonal = arena.take(cells);
        if (!head.is(Head::kGaussianFixed)) head_.cross = arena.take(cells);
        if (head.is(Head::kGaussianGlobal)) head_.log_std_square = arena.take(head.outputs);
    }
    if (has_hessian_) {
        cotangents_.has_kept = true;
        for (int l = 0; l < linearization.network_.num_layers; ++l) {
            const std::int64_t width = linearization.network_.layers[l].outputs;
            cotangents_.layers[l] = {arena.take(2 * num_steps * width), 2 * width};
            if (l < linearization.network_.num_layers - 1) bends_[l] = arena.take(num_steps * width);
        }
    }
    if (terms.scores != nullptr) scores_ = arena.take(num_steps);
    if (terms.scores == nullptr && num_steps > 0) plan_fused(arena);
    memory_size_ = arena.used();
}

template <typename T>
void MlpCurvature<T>::plan_fused(Arena<T>& arena) {
    const MlpLinearization<T>& lin = linearization_;
    fused_.layout = fused_layout<T>(lin.network_, lin.num_steps(), has_hessian_);
    if (fused_.layout.rows == 0) return;
    fused_.network = lin.network_;
    fused_.head = lin.head_;
    fused_.curved = has_curvature_;
    fused_.curvature = head_;
    fused_.params = lin.params_;
    fused_.observations = lin.observations_;
    for (int l = 0; l < lin.network_.num_layers; ++l) {
        fused_.hidden[l] = lin.hidden_[l];
        if (!has_hessian_) continue;
        const Matrix<T>& both = cotangents_.layers[l];
        fused_.kept[l] = {both.data + lin.network_.layers[l].outputs, both.stride};
        fused_.bends[l] = bends_[l];
    }
    partials_ = arena.take(fused_.layout.blocks * size());
}

template <typename T>
std::int64_t MlpCurvature<T>::memory_size(const MlpLinearization<T>& linearization, const Terms<T>& terms) {
    return MlpCurvature(linearization, terms, Arena<T>(nullptr)).memory_size_;
}

template <typename T>
MlpCurvature<T>::MlpCurvature(const MlpLinearization<T>& linearization, const Terms<T>& terms, T* memory,
                              cudaStream_t stream)
    : MlpCurvature(linearization, terms, Arena<T>(memory)) {
    if (linearization.num_steps() == 0) return;
    if (has_curvature_) {
        curve_head(linearization.head_, terms.hessian, terms.fisher, head_, linearization.sums_, stream);
    }
    if (has_hessian_) keep_cotangents(terms.hessian, stream);
    if (scores_ != nullptr) {
        scale_vector(linearization.num_steps(), terms.scores, T(1), scores_, stream);
    }
}

template <typename T>
void MlpCurvature<T>::keep_cotangents(const T* hessian, cudaStream_t stream) {
    const MlpLinearization<T>& lin = linearization_;
    const Network& network = lin.network_;
    const Blas blas = lin.blas(stream);
    const auto kept = [&](int l) {
        const Matrix<T>& both = cotangents_.layers[l];
        return Matrix<T>{both.data + network.layers[l].outputs, both.stride};
    };
    const int last = network.num_layers - 1;
    head_cotangent(lin.head_, static_cast<const HeadCurvature<T>*>(nullptr), OutputTangent<T>{},
                   static_cast<const T*>(nullptr), hessian, kept(last), Partials<T>{}, Partials<T>{}, stream);
    for (int l = last; l > 0; --l) {
        const LayerShape& layer = network.layers[l];
        blas.multiply(lin.num_steps(), layer.inputs, layer.outputs,
                      Matrix<const T>{kept(l).data, kept(l).stride},
                      Matrix<const T>{lin.weight(l), layer.inputs}, Matrix<T>{lin.products_, layer.inputs});
        bend_layer(network.activation, lin.num_steps(), lin.hidden_[l - 1],
                   static_cast<const T*>(lin.products_), kept(l - 1), bends_[l - 1], stream);
    }
}

template <typename T>
Shift<T> MlpCurvature<T>::shift(const T* v) const {
    const bool squared = head_.log_std_square != nullptr;
    return {v, damping_, head_.log_std_square, squared ? linearization_.network_.free_log_std : 0};
}

template <typename T>
void MlpCurvature<T>::apply(const T* v, T* out, T* along, cudaStream_t stream) {
    const MlpLinearization<T>& lin = linearization_;
    if (lin.num_steps() == 0) return scale_vector(size(), v, damping_, out, stream);
    if (partials_ != nullptr) return fused_product(fused_, v, shift(v), along, partials_, out, stream);
    const Blas blas = lin.blas(stream);
    const int last = lin.network_.num_layers - 1;
    pack_weights(lin.network_, v, true, has_hessian_, lin.packed_, damping_, damping_ == T(0) ? nullptr : out,
                 stream);
    lin.tangent_forward(blas, v, has_hessian_ ? bends_ : nullptr, &cotangents_, stream);

    const OutputTangent<T> tangent = lin.output_tangent(v);
    T* const products = along == nullptr && scores_ != nullptr ? lin.along_ : along;
    T* const means = has_curvature_ && lin.head_.is(Head::kCategorical) ? lin.means_ : nullptr;
    if (products != nullptr || means != nullptr) head_along(lin.head_, tangent, products, means, stream);
    if (scores_ != nullptr) accumulate_scores(lin.trajectories_, products, scores_, lin.steps_, stream);
    head_cotangent(lin.head_, has_curvature_ ? &head_ : nullptr, tangent, static_cast<const T*>(means),
                   static_cast<const T*>(scores_ == nullptr ? nullptr : lin.steps_), cotangents_.layers[last],
                   lin.sums(last), lin.log_std_sums(), stream);
    lin.backward(blas, cotangents_, shift(v), out, stream);
}

template class MlpCurvature<float>;
template class MlpCurvature<double>;

}  // namespace parl::cuda
