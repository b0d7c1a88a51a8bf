#include "cpu/mlp_curvature.h"

#include "cpu/tangent_layers.h"

namespace parl::cpu::PARL_ISA {
namespace {

// bends = φ''·g and delta = φ'·g, where delta holds g.
template <typename T>
void bend(Activation activation, std::int64_t rows, std::int64_t columns, const T* hidden, const T* slopes,
          const T* second, T* delta, T* bends) {
    using V = Vec<T>;
    const std::int64_t stride = row_stride<T>(columns);
    math::with_activation(activation, [&](auto a) {
        using A = decltype(a);
        for (std::int64_t i = 0; i < rows * stride; i += stride) {
            for (std::int64_t j = i; j < i + columns; j += V::kWidth) {
                const V g = V::load(delta + j);
                if constexpr (A::kFromValue) {
                    const V h = V::load(hidden + j), d = A::slope_from_value(h) * g;
                    (A::ratio_from_value(h) * d).store(bends + j);
                    d.store(delta + j);
                } else {
                    (V::load(second + j) * g).store(bends + j);
                    (V::load(slopes + j) * g).store(delta + j);
                }
            }
        }
    });
}

}  // namespace

template <typename T>
MlpCurvature<T>::MlpCurvature(MlpLinearization<T>& linearization, const Terms<T>& terms, int num_threads)
    : linearization_(linearization),
      damping_(terms.damping),
      has_hessian_(terms.hessian != nullptr),
      has_curvature_(terms.hessian != nullptr || terms.fisher != nullptr) {
    const MlpLinearization<T>& lin = linearization;
    const int num_layers = lin.num_layers_;
    const std::int64_t num_steps = lin.num_steps_;
    std::int64_t hidden = 0;
    for (int l = 0; l < num_layers - 1; ++l) hidden += num_steps * row_stride<T>(lin.layers_[l].outputs);
    const std::int64_t outputs = num_steps * row_stride<T>(lin.head_.outputs());
    if (has_curvature_) lin.head_.second_order(terms, head_);
    if (has_hessian_) {
        cache_.reserve(2 * hidden + outputs);
        deltas_.reserve(num_layers);
        bends_.reserve(num_layers);
        T* delta = cache_.get();
        for (int l = 0; l < num_layers; ++l) {
            const std::int64_t size = num_steps * row_stride<T>(lin.layers_[l].outputs);
            deltas_[l] = delta;
            bends_[l] = l < num_layers - 1 ? delta + size : nullptr;
            delta += 2 * size;
        }
        keep_deltas(terms.hessian, num_threads);
    }
    if (terms.scores == nullptr) return;
    scores_.reserve(num_steps);
    along_.reserve(num_steps);
    steps_.reserve(num_steps);
    for (std::int64_t t = 0; t < num_steps; ++t) scores_[t] = terms.scores[t];
}

template <typename T>
void MlpCurvature<T>::reserve_passed() {
    const MlpLinearization<T>& lin = linearization_;
    std::int64_t hidden = 0;
    for (int l = 0; l < lin.num_layers_ - 1; ++l)
        hidden += lin.num_steps_ * row_stride<T>(lin.layers_[l].outputs);
    passed_.reserve(has_hessian_ ? 2 * hidden : hidden);
    output_.reserve(lin.num_steps_ * row_stride<T>(lin.head_.outputs()));
    tangents_.reserve(lin.num_layers_);
    bent_.reserve(lin.num_layers_);
    T* passed = passed_.get();
    for (int l = 0; l < lin.num_layers_ - 1; ++l) {
        tangents_[l] = passed;
        passed += lin.num_steps_ * row_stride<T>(lin.layers_[l].outputs);
        bent_[l] = has_hessian_ ? tangents_[l] + hidden : nullptr;
    }
}

template <typename T>
void MlpCurvature<T>::keep_deltas(const T* hessian, int num_threads) {
    MlpLinearization<T>& lin = linearization_;
    if (lin.num_steps_ == 0) return;
    on_threads(lin.prepare(num_threads), [&](Team team) {
        Work<T>& work = lin.works_[team.thread];
        lin.zero_log_std(work);
        lin.for_blocks(team, [&](Block block) {
            lin.enter(work, block);
            const auto rows_of = [&](Buffer<T*>& matrices, int l) {
                return matrices[l] + block.first * row_stride<T>(lin.layers_[l].outputs);
            };
            lin.head_.cotangent(block.first, block.first + block.rows, nullptr, nullptr, nullptr, hessian,
                                rows_of(deltas_, lin.num_layers_ - 1), work.log_std);
            for (int l = lin.num_layers_ - 1; l > 0; --l) {
                const Layer<T>& layer = lin.layers_[l];
                T* const to = rows_of(deltas_, l - 1);
                const Product<T> product{rows_of(deltas_, l), row_stride<T>(layer.outputs), layer.backward, 0,
                                         layer.outputs};
                multiply_packed(block.rows, layer.inputs, &product, 1, to, row_stride<T>(layer.inputs),
                                false);
                bend(lin.activation_, block.rows, layer.inputs, work.hidden[l - 1], work.slopes[l - 1],
                     lin.bends_[l - 1] == nullptr ? nullptr : lin.at(lin.bends_.get(), l - 1, block.first),
                     to, rows_of(bends_, l - 1));
            }
        });
    });
}

template <typename T>
void MlpCurvature<T>::backward(Block block, Work<T>& work, T* const* tangents, T* const* deltas,
                               const T* output, const T* steps, bool accumulate) const {
    const MlpLinearization<T>& lin = linearization_;
    const int last = lin.num_layers_ - 1;
    lin.head_.cotangent(block.first, block.first + block.rows, has_curvature_ ? &head_ : nullptr, output,
                        lin.log_std_tangent_.get(), steps, work.deltas[last], work.log_std);
    for (int l = last; l >= 0; --l) {
        const Layer<T>& layer = lin.layers_[l];
        const T* const delta = l == last ? work.deltas[last] : deltas[l];
        const T* const kept = has_hessian_ ? lin.at(deltas_.get(), l, block.first) : nullptr;
        const T* const input = l == 0 ? lin.observations(block.first) : work.hidden[l - 1];
        layer_gradient(layer, block.rows, delta, input, l == 0 ? nullptr : kept,
                       l == 0 ? nullptr : tangents[l - 1], work.gradients[l], accumulate);
        if (l == 0) continue;
        const std::int64_t stride = row_stride<T>(layer.outputs);
        const Product<T> products[2] = {{delta, stride, layer.backward, 0, layer.outputs},
                                        {kept, stride, lin.tangents_[l].backward, 0, layer.outputs}};
        backward_layer(block.rows, layer.inputs, products, has_hessian_ ? 2 : 1,
                       Activated<T>{lin.activation_, work.hidden[l - 1], work.slopes[l - 1]}, has_hessian_,
                       deltas[l - 1], work.scratch);
    }
}

template <typename T>
void MlpCurvature<T>::accumulate_scores(std::int64_t first, std::int64_t last) {
    const MlpLinearization<T>& lin = linearization_;
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = lin.offsets_[i], end = lin.offsets_[i + 1];
        T sum(0);
        for (std::int64_t t = begin; t < end; ++t) steps_[t] = scores_[t] * (sum += along_[t]);
        sum = T(0);
        for (std::int64_t t = end - 1; t >= begin; --t) steps_[t] = sum += steps_[t];
    }
}

template <typename T>
void MlpCurvature<T>::forward(Block block, Work<T>& work, T* const* tangents, T* const* bent, T* output,
                              T* along) const {
    const MlpLinearization<T>& lin = linearization_;
    lin.enter(work, block);
    lin.tangent_forward(block, work, has_hessian_ ? bends_.get() : nullptr, tangents, bent, output);
    if (along == nullptr) return;
    lin.head_.along(block.first, block.first + block.rows, output, lin.log_std_tangent_.get(),
                    along + block.first);
}

template <typename T>
void MlpCurvature<T>::pass_whole_trajectories(Team team, Work<T>& work) {
    bool is_later = false;
    linearization_.for_whole_blocks(team, [&](Block block, std::int64_t first, std::int64_t last) {
        forward(block, work, work.tangents, work.deltas, work.output, along_.get());
        accumulate_scores(first, last);
        backward(block, work, work.tangents, work.deltas, work.output, steps_.get(), is_later);
        is_later = true;
    });
    if (!is_later) linearization_.zero_gradients(work);
}

template <typename T>
void MlpCurvature<T>::pass_long_trajectories(Team team, Work<T>& work) {
    const MlpLinearization<T>& lin = linearization_;
    // Points to the block's rows; the output's are returned.
    const auto enter = [&](Block block) {
        for (int l = 0; l < lin.num_layers_ - 1; ++l) {
            const std::int64_t at = block.first * row_stride<T>(lin.layers_[l].outputs);
            work.passed_tangents[l] = tangents_[l] + at;
            work.passed_deltas[l] = has_hessian_ ? bent_[l] + at : work.deltas[l];
        }
        return output_.get() + block.first * row_stride<T>(lin.head_.outputs());
    };
    lin.for_blocks(team, [&](Block block) {
        T* const output = enter(block);
        forward(block, work, work.passed_tangents, work.passed_deltas, output, along_.get());
    });
    team.barrier();
    accumulate_scores(lin.num_trajectories_ * team.thread / team.threads,
                      lin.num_trajectories_ * (team.thread + 1) / team.threads);
    team.barrier();
    bool is_later = false;
    lin.for_blocks(team, [&](Block block) {
        const T* const output = enter(block);
        lin.enter(work, block);
        backward(block, work, work.passed_tangents, work.passed_deltas, output, steps_.get(), is_later);
        is_later = true;
    });
}

template <typename T>
void MlpCurvature<T>::apply(const T* v, T* out, T* along, int num_threads) {
    MlpLinearization<T>& lin = linearization_;
    const auto scaled = [&](std::int64_t i) { return damping_ * v[i]; };
    for (std::int64_t i = 0; lin.num_steps_ == 0 && i < lin.num_params_; ++i) out[i] = scaled(i);
    if (lin.num_steps_ == 0) return;
    const bool has_scores = scores_.get() != nullptr;
    const int threads = lin.prepare(num_threads);
    const bool whole = has_scores && lin.has_whole_blocks(threads);
    if (has_scores && !whole) reserve_passed();
    on_threads(threads, [&](Team team) {
        Work<T>& work = lin.works_[team.thread];
        lin.pack_tangents(v, has_hessian_, team);
        lin.zero_log_std(work);
        team.barrier();
        if (whole) {
            pass_whole_trajectories(team, work);
        } else if (has_scores) {
            pass_long_trajectories(team, work);
        } else {
            bool is_later = false;
            lin.for_blocks(team, [&](Block block) {
                forward(block, work, work.tangents, work.deltas, work.output, along);
                backward(block, work, work.tangents, work.deltas, work.output, nullptr, is_later);
                is_later = true;
            });
        }
        team.barrier();
        lin.gather(out, team);
        if (team.thread == 0) {
            const std::int64_t free = has_curvature_ ? lin.head_.free_log_std() : 0;
            for (std::int64_t j = 0; j < free; ++j) out[j] += head_.log_std_square[j] * v[j];
            for (std::int64_t t = 0; has_scores && along != nullptr && t < lin.num_steps_; ++t)
                along[t] = along_[t];
        }
        if (damping_ == T(0)) return;
        team.barrier();
        const std::int64_t first = lin.num_params_ * team.thread / team.threads;
        const std::int64_t last = lin.num_params_ * (team.thread + 1) / team.threads;
        for (std::int64_t i = first; i < last; ++i) out[i] += scaled(i);
    });
}

template class MlpCurvature<float>;
template class MlpCurvature<double>;

}  // namespace parl::cpu::PARL_ISA
