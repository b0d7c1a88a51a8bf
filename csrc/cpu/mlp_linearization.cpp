#include "cpu/mlp_linearization.h"

#include "cpu/mlp_curvature.h"
#include "cpu/tangent_layers.h"

namespace parl::cpu::PARL_ISA {
namespace {

// Steps that pass through all layers together.
constexpr std::int64_t kBlockRows = 112;
// A thread for fewer multiplications (steps × parameters) costs more to wake than it saves.
constexpr std::int64_t kParallelWork = std::int64_t{1} << 18;

template <typename T>
PARL_INLINE void copy(const T* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

}  // namespace

template <typename T>
MlpLinearization<T>::MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, int num_threads)
    : num_layers_(policy.num_layers),
      activation_(policy.activation),
      num_steps_(steps.num_steps),
      num_trajectories_(steps.num_trajectories),
      num_params_(0),
      block_rows_(kBlockRows),
      head_(policy, steps),
      offsets_(steps.num_trajectories + 1),
      x_(steps.num_steps * row_stride<T>(policy.widths[0])),
      log_prob_(steps.num_steps),
      layers_(policy.num_layers),
      hidden_(policy.num_layers),
      slopes_(policy.num_layers),
      bends_(policy.num_layers),
      tangents_(policy.num_layers) {
    const std::int64_t* const widths = policy.widths;
    const bool slopes = needs_slopes(activation_);
    copy(steps.offsets, num_trajectories_ + 1, offsets_.get());
    std::int64_t packed = 0, cached = 0;
    for (int l = 0; l < num_layers_; ++l) {
        packed += layer_size<T>(widths[l], widths[l + 1]);
        if (l < num_layers_ - 1) cached += num_steps_ * row_stride<T>(widths[l + 1]);
    }
    packed_.reserve(packed);
    packed_tangents_.reserve(packed);
    cache_.reserve(slopes ? 3 * cached : cached);
    T* layer = packed_.get();
    T* tangent = packed_tangents_.get();
    T* hidden = cache_.get();
    for (int l = 0; l < num_layers_; ++l) {
        layers_[l] = layer_at(layer, widths[l], widths[l + 1]);
        tangents_[l] = layer_at(tangent, widths[l], widths[l + 1]);
        layer += layer_size<T>(widths[l], widths[l + 1]);
        tangent += layer_size<T>(widths[l], widths[l + 1]);
        hidden_[l] = hidden;
        slopes_[l] = slopes ? hidden + cached : nullptr;
        bends_[l] = slopes ? hidden + 2 * cached : nullptr;
        hidden += num_steps_ * row_stride<T>(widths[l + 1]);
        num_params_ += (widths[l] + 1) * widths[l + 1];
    }
    num_params_ += head_.free_log_std();
    log_std_tangent_.reserve(row_stride<T>(head_.outputs()));

    const int threads = prepare(num_threads);
    if (num_steps_ == 0) return;
    on_threads(threads, [&](Team team) {
        const T* weight = policy.params + head_.free_log_std();
        for (int l = 0; l < num_layers_; ++l) {
            const std::int64_t size = widths[l] * widths[l + 1];
            pack_layer(layers_[l], weight, weight + size, WeightLayout::kOutIn, l > 0, team.thread,
                       team.threads);
            weight += size + widths[l + 1];
        }
        team.barrier();
        for_blocks(team, [&](Block block) {
            const std::int64_t stride = row_stride<T>(widths[0]);
            for (std::int64_t t = block.first; t < block.first + block.rows; ++t) {
                copy(steps.observations + t * widths[0], widths[0], x_.get() + t * stride);
                for (std::int64_t j = widths[0]; j < stride; ++j) x_[t * stride + j] = T(0);
            }
            const T* from = observations(block.first);
            for (int l = 0; l < num_layers_; ++l) {
                const bool is_last = l == num_layers_ - 1;
                const std::int64_t out_stride = row_stride<T>(widths[l + 1]),
                                   offset = block.first * out_stride;
                T* const to = (is_last ? head_.network_output() : hidden_[l]) + offset;
                const Product<T> product{from, row_stride<T>(widths[l]), layers_[l].forward, 0, widths[l]};
                output_layer(block.rows, widths[l + 1], &product, 1, layers_[l].bias, to);
                if (!is_last) {
                    activate(activation_, block.rows, widths[l + 1], to,
                             slopes ? slopes_[l] + offset : nullptr, slopes ? bends_[l] + offset : nullptr);
                }
                from = to;
            }
            head_.start(block.first, block.first + block.rows, log_prob_.get());
        });
    });
}

template <typename T>
int MlpLinearization<T>::prepare(int num_threads) {
    std::int64_t threads = num_threads;
    if (num_steps_ * num_params_ < kParallelWork) threads = 1;
    if (threads > num_steps_) threads = num_steps_ > 0 ? num_steps_ : 1;
    if (threads <= prepared_) return static_cast<int>(threads);
    prepared_ = 0;
    const std::int64_t outputs = row_stride<T>(head_.outputs());
    std::int64_t hidden = 0, widest = 0, gradients = 0;
    for (int l = 0; l < num_layers_; ++l) {
        const std::int64_t stride = row_stride<T>(layers_[l].outputs);
        gradients += gradient_size<T>(layers_[l].inputs, layers_[l].outputs);
        if (l == num_layers_ - 1) continue;
        hidden += stride;
        if (stride > widest) widest = stride;
    }
    // A line more, so that two threads never write to the same one.
    const std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t each =
        block_rows_ * (2 * hidden + 2 * outputs) + kLayerRows * widest + gradients + outputs + line;
    memory_.reserve(threads * each);
    works_.reserve(threads);
    pointers_.reserve(threads * 5 * num_layers_);
    parts_.reserve(threads * num_layers_);
    constant_pointers_.reserve(threads * 2 * num_layers_);
    for (std::int64_t thread = 0; thread < threads; ++thread) {
        Work<T>& work = works_[thread];
        T* memory = memory_.get() + thread * each;
        const auto take = [&](std::int64_t size) {
            T* const taken = memory;
            memory += size;
            return taken;
        };
        work.tangents = pointers_.get() + thread * 5 * num_layers_;
        work.deltas = work.tangents + num_layers_;
        work.gradients = work.deltas + num_layers_;
        work.passed_tangents = work.gradients + num_layers_;
        work.passed_deltas = work.passed_tangents + num_layers_;
        work.hidden = constant_pointers_.get() + thread * 2 * num_layers_;
        work.slopes = work.hidden + num_layers_;
        for (int l = 0; l < num_layers_; ++l) {
            const std::int64_t size = block_rows_ * row_stride<T>(layers_[l].outputs);
            work.tangents[l] = l < num_layers_ - 1 ? take(size) : nullptr;
            work.deltas[l] = take(size);
            work.gradients[l] = take(gradient_size<T>(layers_[l].inputs, layers_[l].outputs));
            parts_[l * threads + thread] = work.gradients[l];
        }
        work.log_std = take(outputs);
        work.output = take(block_rows_ * outputs);
        work.scratch = take(kLayerRows * widest);
    }
    prepared_ = static_cast<int>(threads);
    return prepared_;
}

template <typename T>
std::int64_t MlpLinearization<T>::first_trajectory(int thread, int threads) const {
    if (thread == threads) return num_trajectories_;
    // The first to begin at, or after, the middle of the one that holds this step.
    const std::int64_t step = num_steps_ * thread / threads;
    std::int64_t low = 0, high = num_trajectories_;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (offsets_[middle] + offsets_[middle + 1] < 2 * step) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

template <typename T>
bool MlpLinearization<T>::has_whole_blocks(int threads) const {
    for (std::int64_t i = 0; i < num_trajectories_; ++i) {
        if (offsets_[i + 1] - offsets_[i] > block_rows_) return false;
    }
    for (int thread = 0; thread < threads; ++thread) {
        const std::int64_t begin = offsets_[first_trajectory(thread, threads)];
        const std::int64_t rows = offsets_[first_trajectory(thread + 1, threads)] - begin;
        // Waiting for the slowest thread would cost more than what stays in the caches saves.
        if (rows == 0 || 16 * rows * threads > 17 * num_steps_) return false;
    }
    return true;
}

template <typename T>
void MlpLinearization<T>::enter(Work<T>& work, Block block) const {
    for (int l = 0; l < num_layers_ - 1; ++l) {
        work.hidden[l] = at(hidden_.get(), l, block.first);
        work.slopes[l] = slopes_[l] == nullptr ? nullptr : at(slopes_.get(), l, block.first);
    }
}

template <typename T>
void MlpLinearization<T>::pack_tangents(const T* v, bool with_backward, Team team) {
    const T* weight = v + head_.free_log_std();
    for (int l = 0; l < num_layers_; ++l) {
        const Layer<T>& layer = tangents_[l];
        const std::int64_t size = layer.inputs * layer.outputs;
        pack_layer(layer, weight, weight + size, WeightLayout::kOutIn, with_backward && l > 0, team.thread,
                   team.threads);
        weight += size + layer.outputs;
    }
    if (team.thread > 0) return;
    for (std::int64_t j = 0; j < row_stride<T>(head_.outputs()); ++j) {
        log_std_tangent_[j] = j < head_.free_log_std() ? v[j] : T(0);
    }
}

template <typename T>
void MlpLinearization<T>::tangent_forward(Block block, const Work<T>& work, T* const* bends,
                                          T* const* tangents, T* const* bent, T* output) const {
    for (int l = 0; l < num_layers_; ++l) {
        const Layer<T>& layer = layers_[l];
        const Layer<T>& tangent = tangents_[l];
        const std::int64_t stride = row_stride<T>(layer.inputs);
        const T* const input = l == 0 ? observations(block.first) : work.hidden[l - 1];
        Product<T> products[2] = {{input, stride, tangent.forward, 0, layer.inputs}, {}};
        if (l > 0) products[1] = {tangents[l - 1], stride, layer.forward, 0, layer.inputs};
        const int count = l > 0 ? 2 : 1;
        if (l == num_layers_ - 1) {
            output_layer(block.rows, layer.outputs, products, count, tangent.bias, output);
            continue;
        }
        forward_layer(block.rows, layer.outputs, products, count, tangent.bias,
                      Activated<T>{activation_, work.hidden[l], work.slopes[l]},
                      bends == nullptr ? nullptr : at(bends, l, block.first), tangents[l],
                      bends == nullptr ? nullptr : bent[l]);
    }
}

template <typename T>
void MlpLinearization<T>::gather(T* out, Team team) const {
    if (team.thread == 0) {
        for (std::int64_t j = 0; j < head_.free_log_std(); ++j) {
            out[j] = T(0);
            for (int p = 0; p < team.threads; ++p) out[j] += works_[p].log_std[j];
        }
    }
    T* to = out + head_.free_log_std();
    for (int l = 0; l < num_layers_; ++l) {
        const std::int64_t size = layers_[l].inputs * layers_[l].outputs;
        gather_gradient(layers_[l], parts_.get() + l * prepared_, team.threads, WeightLayout::kOutIn, to,
                        to + size, team.thread, team.threads);
        to += size + layers_[l].outputs;
    }
}

template <typename T>
void MlpLinearization<T>::zero_log_std(Work<T>& work) const {
    for (std::int64_t j = 0; j < row_stride<T>(head_.outputs()); ++j) work.log_std[j] = T(0);
}

template <typename T>
void MlpLinearization<T>::zero_gradients(Work<T>& work) const {
    for (int l = 0; l < num_layers_; ++l) {
        const std::int64_t size = gradient_size<T>(layers_[l].inputs, layers_[l].outputs);
        for (std::int64_t i = 0; i < size; ++i) work.gradients[l][i] = T(0);
    }
}

template <typename T>
void MlpLinearization<T>::jvp(const T* v, T* out, int num_threads) {
    if (num_steps_ == 0) return;
    on_threads(prepare(num_threads), [&](Team team) {
        Work<T>& work = works_[team.thread];
        pack_tangents(v, false, team);
        team.barrier();
        for_blocks(team, [&](Block block) {
            enter(work, block);
            tangent_forward(block, work, nullptr, work.tangents, nullptr, work.output);
            head_.along(block.first, block.first + block.rows, work.output, log_std_tangent_.get(),
                        out + block.first);
        });
    });
}

template <typename T>
void MlpLinearization<T>::vjp(const T* w, T* out, int num_threads) {
    for (std::int64_t i = 0; num_steps_ == 0 && i < num_params_; ++i) out[i] = T(0);
    if (num_steps_ == 0) return;
    on_threads(prepare(num_threads), [&](Team team) {
        Work<T>& work = works_[team.thread];
        zero_log_std(work);
        bool is_later = false;
        for_blocks(team, [&](Block block) {
            enter(work, block);
            head_.cotangent(block.first, block.first + block.rows, nullptr, nullptr, nullptr, w,
                            work.deltas[num_layers_ - 1], work.log_std);
            mlp_backward(layers_.get(), num_layers_, activation_, block.rows, observations(block.first),
                         work.hidden, work.slopes, work.deltas, work.gradients, is_later,
                         static_cast<T*>(nullptr));
            is_later = true;
        });
        team.barrier();
        gather(out, team);
    });
}

template <typename T>
void MlpLinearization<T>::scores(const T* w, T* out, int num_threads) {
    on_threads(prepare(num_threads), [&](Team team) {
        // A trajectory belongs to the thread that has its first step; empty ones at the end to the last.
        const std::int64_t begin = num_steps_ * team.thread / team.threads;
        const std::int64_t end =
            team.thread == team.threads - 1 ? num_steps_ + 1 : num_steps_ * (team.thread + 1) / team.threads;
        for (std::int64_t i = 0; i < num_trajectories_; ++i) {
            if (offsets_[i] >= begin && offsets_[i] < end) {
                write_scores(i, w, works_[team.thread], out + i * num_params_);
            }
        }
    });
}

template <typename T>
void MlpLinearization<T>::write_scores(std::int64_t trajectory, const T* w, Work<T>& work, T* row) const {
    const std::int64_t begin = offsets_[trajectory], end = offsets_[trajectory + 1];
    for (std::int64_t i = 0; begin == end && i < num_params_; ++i) row[i] = T(0);
    if (begin == end) return;
    zero_log_std(work);
    const std::int64_t blocks = (end - begin + block_rows_ - 1) / block_rows_;
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t first = begin + (end - begin) * b / blocks;
        const Block block{first, begin + (end - begin) * (b + 1) / blocks - first};
        enter(work, block);
        head_.cotangent(block.first, block.first + block.rows, nullptr, nullptr, nullptr, w,
                        work.deltas[num_layers_ - 1], work.log_std);
        mlp_backward(layers_.get(), num_layers_, activation_, block.rows, observations(block.first),
                     work.hidden, work.slopes, work.deltas, static_cast<T* const*>(nullptr), false,
                     static_cast<T*>(nullptr));
        T* to = row + head_.free_log_std();
        for (int l = 0; l < num_layers_; ++l) {
            const Layer<T>& layer = layers_[l];
            const T* const input = l == 0 ? observations(block.first) : work.hidden[l - 1];
            T* const bias = to + layer.inputs * layer.outputs;
            if (layer.inputs % Vec<T>::kWidth == 0) {  // rows without padding: straight to where they belong
                const Product<T> product{work.deltas[l], row_stride<T>(layer.outputs), input,
                                         row_stride<T>(layer.inputs), block.rows};
                multiply_transposed(layer.outputs, layer.inputs, &product, 1, to, layer.inputs, b > 0);
                sum_rows(block.rows, layer.outputs, work.deltas[l], work.gradients[l], b > 0);
                if (b == blocks - 1) copy(work.gradients[l], layer.outputs, bias);
            } else {
                layer_gradient<T>(layer, block.rows, work.deltas[l], input, nullptr, nullptr,
                                  work.gradients[l], b > 0);
                if (b == blocks - 1) {
                    const T* const gradient = work.gradients[l];
                    gather_gradient(layer, &gradient, 1, WeightLayout::kOutIn, to, bias);
                }
            }
            to = bias + layer.outputs;
        }
    }
    copy(work.log_std, head_.free_log_std(), row);
}

template <typename T>
Curvature<T>* MlpLinearization<T>::curvature(const Terms<T>& terms, int num_threads) {
    return new MlpCurvature<T>(*this, terms, num_threads);
}

template <typename T>
Linearization<T>* linearize(const Policy<T>& policy, const Steps<T>& steps, int num_threads) {
    return new MlpLinearization<T>(policy, steps, num_threads);
}

template class MlpLinearization<float>;
template class MlpLinearization<double>;
template Linearization<float>* linearize<float>(const Policy<float>&, const Steps<float>&, int);
template Linearization<double>* linearize<double>(const Policy<double>&, const Steps<double>&, int);

}  // namespace parl::cpu::PARL_ISA
