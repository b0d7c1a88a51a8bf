// How the work is divided: every thread takes a share of the rows, the same for each member, and blocks of
// these through all layers while they stay in its cache. It sums parameter gradients of its own, which are
// added in the order of the threads at the end; so results are bit-identical for a given number of threads.
#include "cpu/ensemble.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/arena.h"
#include "cpu/mlp.h"
#include "math/preference.h"

namespace parl::cpu::PARL_ISA {
namespace {

constexpr std::int64_t kBlockRows = 128;
constexpr auto kLeakyRelu = Activation::kLeakyRelu;

// One thread's memory: a block's matrices, and the sums of gradients of every member.
template <typename T>
struct Scratch {
    T* x;
    T* hidden[kEnsembleMaxLayers];
    T* deltas[kEnsembleMaxLayers];
    T* out;
    T* input_gradient;
    T* gradients;              // of member 0, layer after layer
    std::int64_t member_size;  // from one member's to the next one's
};

// Whole pairs pass through the layers together.
PARL_INLINE std::int64_t block_rows_of(std::int64_t pair_length) {
    const std::int64_t rows = 2 * pair_length;
    return rows == 0 ? kBlockRows : (rows < kBlockRows ? kBlockRows / rows * rows : rows);
}

template <typename T>
std::int64_t layer_gradient_size(const Ensemble<T>& ensemble, int layer) {
    return (gradient_size<T>(ensemble.widths[layer], ensemble.widths[layer + 1]) + 15) / 16 * 16;
}

template <typename T>
Scratch<T> place_scratch(const Ensemble<T>& ensemble, std::int64_t block_rows, Arena<T>& arena) {
    Scratch<T> s{};
    const auto matrix = [&](std::int64_t columns) { return arena.take(block_rows * row_stride<T>(columns)); };
    s.x = matrix(ensemble.widths[0]);
    s.input_gradient = matrix(ensemble.widths[0]);
    for (int l = 0; l < ensemble.num_layers; ++l) {
        s.hidden[l] = matrix(ensemble.widths[l + 1]);
        s.deltas[l] = matrix(ensemble.widths[l + 1]);
        s.member_size += layer_gradient_size(ensemble, l);
    }
    s.out = s.hidden[ensemble.num_layers - 1];
    s.gradients = arena.take(ensemble.members * s.member_size);
    return s;
}

// Member k's packed layer l is at memory + offsets[l] + k · member_size.
template <typename T>
struct Packed {
    T* memory;
    std::int64_t offsets[kEnsembleMaxLayers];
    std::int64_t member_size;
};

template <typename T>
Packed<T> place_packed(const Ensemble<T>& ensemble, Arena<T>& arena) {
    Packed<T> packed{};
    Arena<T> member{nullptr};
    for (int l = 0; l < ensemble.num_layers; ++l) {
        packed.offsets[l] = member.used;
        member.take(layer_size<T>(ensemble.widths[l], ensemble.widths[l + 1]));
    }
    packed.member_size = member.used;
    packed.memory = arena.take(ensemble.members * member.used);
    return packed;
}

template <typename T>
struct Worker {
    const Ensemble<T>& ensemble;
    const Packed<T> packed;
    const Scratch<T> s;
    const int me;
    const int parts;
    const std::int64_t own_size;

    const std::int64_t out_stride = row_stride<T>(1);

    Layer<T> layer(std::int64_t k, int l) const {
        return layer_at(packed.memory + k * packed.member_size + packed.offsets[l], ensemble.widths[l],
                        ensemble.widths[l + 1]);
    }

    void pack_member(std::int64_t k, bool with_backward, bool with_input_gradient) const {
        for (int l = 0; l < ensemble.num_layers; ++l) {
            const std::int64_t inputs = ensemble.widths[l], outputs = ensemble.widths[l + 1];
            pack_layer(layer(k, l), ensemble.weights[l] + k * inputs * outputs,
                       ensemble.biases[l] + k * outputs, WeightLayout::kInOut,
                       with_backward && (l > 0 || with_input_gradient), me, parts);
        }
    }

    void load(const T* inputs, std::int64_t rows, T* x) const {
        const std::int64_t columns = ensemble.widths[0], stride = row_stride<T>(columns);
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < columns; ++j) x[i * stride + j] = inputs[i * columns + j];
        }
    }

    // s.out[i · out_stride] becomes the reward of row i of s.x.
    void forward(const Layer<T>* layers, std::int64_t rows) const {
        mlp_forward<T>(layers, ensemble.num_layers, kLeakyRelu, rows, s.x, s.hidden, nullptr, s.out);
        constexpr int kWidth = Vec<T>::kWidth;
        for (std::int64_t i = 0; i < rows; i += kWidth) {
            Vec<T> values(T(0));
            const std::int64_t count = rows - i < kWidth ? rows - i : kWidth;
            for (std::int64_t j = 0; j < count; ++j) values.v[j] = s.out[(i + j) * out_stride];
            values = math::tanh(values);
            for (std::int64_t j = 0; j < count; ++j) s.out[(i + j) * out_stride] = values.v[j];
        }
    }

    // From the gradient of the rewards in the first column of the last deltas.
    void backward(const Layer<T>* layers, std::int64_t k, std::int64_t rows, bool accumulate,
                  T* input_gradient) const {
        T* const delta = s.deltas[ensemble.num_layers - 1];
        for (std::int64_t i = 0; i < rows; ++i) {
            const T reward = s.out[i * out_stride];
            delta[i * out_stride] *= T(1) - reward * reward;
        }
        T* gradients[kEnsembleMaxLayers];
        T* next = s.gradients + k * s.member_size;
        for (int l = 0; l < ensemble.num_layers; ++l) {
            gradients[l] = next;
            next += layer_gradient_size(ensemble, l);
        }
        mlp_backward<T>(layers, ensemble.num_layers, kLeakyRelu, rows, s.x, s.hidden, nullptr, s.deltas,
                        gradients, accumulate, input_gradient);
    }

    // The sum of all threads' gradients; each thread writes a part of it.
    void gather(const EnsembleGradients<T>& gradients) const {
        for (std::int64_t k = 0; k < ensemble.members; ++k) {
            T* mine = s.gradients + k * s.member_size;
            for (int l = 0; l < ensemble.num_layers; ++l) {
                const T* all[kEnsembleMaxThreads];
                for (int p = 0; p < parts; ++p) all[p] = mine + (p - me) * own_size;
                const std::int64_t inputs = ensemble.widths[l], outputs = ensemble.widths[l + 1];
                gather_gradient(layer(k, l), all, parts, WeightLayout::kInOut,
                                gradients.weights[l] + k * inputs * outputs,
                                gradients.biases[l] + k * outputs, me, parts);
                mine += layer_gradient_size(ensemble, l);
            }
        }
    }

    // Calls visit(layers, first, count, accumulate) for blocks of at most `block` of member k's `total` things:
    // this thread's share.
    template <typename Visit>
    void for_each_block_of(std::int64_t k, std::int64_t total, std::int64_t block, const Visit& visit) const {
        const std::int64_t begin = me * total / parts, end = (me + 1) * total / parts;
        const std::int64_t blocks = (end - begin + block - 1) / block;
        Layer<T> layers[kEnsembleMaxLayers];
        for (int l = 0; l < ensemble.num_layers; ++l) layers[l] = layer(k, l);
        for (std::int64_t b = 0; b < blocks; ++b) {
            const std::int64_t first = begin + b * (end - begin) / blocks;
            visit(layers, first, begin + (b + 1) * (end - begin) / blocks - first, b > 0);
        }
    }

    // The same for all members: visit(layers, member, first, count, accumulate).
    template <typename Visit>
    void for_each_block(std::int64_t total, std::int64_t block, const Visit& visit) const {
        for (std::int64_t k = 0; k < ensemble.members; ++k) {
            for_each_block_of(k, total, block,
                              [&](const Layer<T>* layers, std::int64_t first, std::int64_t count,
                                  bool accumulate) { visit(layers, k, first, count, accumulate); });
        }
    }
};

PARL_INLINE void wait_for_all() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Runs work(worker) on every thread, with all members packed.
template <typename T, typename Work>
void on_all_threads(const Ensemble<T>& ensemble, std::int64_t block_rows, T* workspace,
                    [[maybe_unused]] int num_threads, bool with_backward, bool with_input_gradient,
                    const Work& work) {
    Arena<T> shared{workspace}, counter{nullptr};
    const Packed<T> packed = place_packed(ensemble, shared);
    place_scratch(ensemble, block_rows, counter);
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
#endif
    {
        int me = 0, parts = 1;
#ifdef _OPENMP
        me = omp_get_thread_num();
        parts = omp_get_num_threads();
#endif
        Arena<T> own{workspace + shared.used + me * counter.used};
        const Worker<T> worker{ensemble, packed, place_scratch(ensemble, block_rows, own),
                               me,       parts,  counter.used};
        for (std::int64_t k = 0; k < ensemble.members; ++k) {
            worker.pack_member(k, with_backward, with_input_gradient);
        }
        wait_for_all();
        work(worker);
    }
}

}  // namespace

template <typename T>
std::int64_t ensemble_workspace(const Ensemble<T>& ensemble, std::int64_t pair_length, int num_threads) {
    Arena<T> shared{nullptr}, own{nullptr};
    place_packed(ensemble, shared);
    place_scratch(ensemble, block_rows_of(pair_length), own);
    return shared.used + num_threads * own.used;
}

template <typename T>
void ensemble_forward(const Ensemble<T>& ensemble, const EnsembleInputs<T>& inputs, T* workspace,
                      int num_threads, T* rewards) {
    on_all_threads(ensemble, kBlockRows, workspace, num_threads, false, false, [&](const Worker<T>& worker) {
        worker.for_each_block(
            inputs.rows, kBlockRows,
            [&](const Layer<T>* layers, std::int64_t k, std::int64_t first, std::int64_t rows, bool) {
                worker.load(inputs.data + k * inputs.member_stride + first * ensemble.widths[0], rows,
                            worker.s.x);
                worker.forward(layers, rows);
                for (std::int64_t i = 0; i < rows; ++i) {
                    rewards[k * inputs.rows + first + i] = worker.s.out[i * worker.out_stride];
                }
            });
    });
}

template <typename T>
void ensemble_forward_few(const Ensemble<T>& ensemble, const EnsembleInputs<T>& inputs, T* scratch,
                          T* rewards) {
    constexpr int kWidth = Vec<T>::kWidth, kTogether = 4;
    std::int64_t widest = 0;
    for (int l = 0; l <= ensemble.num_layers; ++l) {
        widest = widest < ensemble.widths[l] ? ensemble.widths[l] : widest;
    }
    for (std::int64_t k = 0; k < ensemble.members; ++k) {
        for (std::int64_t i = 0; i < inputs.rows; ++i) {
            const T* x = inputs.data + k * inputs.member_stride + i * ensemble.widths[0];
            for (int l = 0; l < ensemble.num_layers; ++l) {
                const std::int64_t in = ensemble.widths[l], out = ensemble.widths[l + 1];
                const T* const weight = ensemble.weights[l] + k * in * out;
                const T* const bias = ensemble.biases[l] + k * out;
                T* const to = scratch + (l % 2) * widest;
                std::int64_t j = 0;
                for (; j + kTogether * kWidth <= out; j += kTogether * kWidth) {
                    Vec<T> sums[kTogether];
                    for (int c = 0; c < kTogether; ++c) sums[c] = Vec<T>::load(bias + j + c * kWidth);
                    for (std::int64_t r = 0; r < in; ++r) {
                        const T* const row = weight + r * out + j;
                        for (int c = 0; c < kTogether; ++c)
                            sums[c] += Vec<T>(x[r]) * Vec<T>::load(row + c * kWidth);
                    }
                    for (int c = 0; c < kTogether; ++c) sums[c].store(to + j + c * kWidth);
                }
                for (; j < out; ++j) {
                    to[j] = bias[j];
                    for (std::int64_t r = 0; r < in; ++r) to[j] += x[r] * weight[r * out + j];
                }
                if (l < ensemble.num_layers - 1) {
                    for (std::int64_t c = 0; c < out; ++c) to[c] = math::LeakyRelu::value(to[c]);
                }
                x = to;
            }
            rewards[k * inputs.rows + i] = math::tanh(*x);
        }
    }
}

template <typename T>
void ensemble_backward(const Ensemble<T>& ensemble, const EnsembleInputs<T>& inputs, const T* weights,
                       T* workspace, int num_threads, const EnsembleGradients<T>& gradients,
                       T* input_gradients) {
    const bool wants_inputs = input_gradients != nullptr;
    const std::int64_t columns = ensemble.widths[0];
    on_all_threads(
        ensemble, kBlockRows, workspace, num_threads, true, wants_inputs, [&](const Worker<T>& worker) {
            worker.for_each_block(inputs.rows, kBlockRows,
                                  [&](const Layer<T>* layers, std::int64_t k, std::int64_t first,
                                      std::int64_t rows, bool accumulate) {
                                      worker.load(inputs.data + k * inputs.member_stride + first * columns,
                                                  rows, worker.s.x);
                                      worker.forward(layers, rows);
                                      T* const delta = worker.s.deltas[ensemble.num_layers - 1];
                                      for (std::int64_t i = 0; i < rows; ++i) {
                                          delta[i * worker.out_stride] = weights[k * inputs.rows + first + i];
                                      }
                                      worker.backward(layers, k, rows, accumulate,
                                                      wants_inputs ? worker.s.input_gradient : nullptr);
                                      if (!wants_inputs) return;
                                      T* const to = input_gradients + (k * inputs.rows + first) * columns;
                                      const std::int64_t stride = row_stride<T>(columns);
                                      for (std::int64_t i = 0; i < rows; ++i) {
                                          for (std::int64_t j = 0; j < columns; ++j)
                                              to[i * columns + j] = worker.s.input_gradient[i * stride + j];
                                      }
                                  });
            wait_for_all();
            worker.gather(gradients);
        });
}

template <typename T>
double ensemble_preference_gradient(const Ensemble<T>& ensemble, const EnsemblePairs<T>& pairs, T* workspace,
                                    int num_threads, const EnsembleGradients<T>& gradients, T* logits) {
    double losses[kEnsembleMaxThreads] = {};
    const std::int64_t block_rows = block_rows_of(pairs.longest), columns = ensemble.widths[0];
    const T share = T(1) / static_cast<T>(pairs.batch_size);
    const std::int64_t x_stride = row_stride<T>(columns);
    int used = 1;
    on_all_threads(ensemble, block_rows, workspace, num_threads, true, false, [&](const Worker<T>& worker) {
        const std::int64_t stride = worker.out_stride;
        double loss = 0;
        for (std::int64_t k = 0; k < ensemble.members; ++k) {
            // A thread without a block of this member's adds nothing.
            T* const mine = worker.s.gradients + k * worker.s.member_size;
            for (std::int64_t i = 0; i < worker.s.member_size; ++i) mine[i] = T(0);
            const auto visit = [&](const Layer<T>* layers, std::int64_t first, std::int64_t count,
                                   bool accumulate) {
                first += pairs.offsets[k];
                std::int64_t rows = 0;
                for (std::int64_t m = first; m < first + count; ++m) {
                    for (int side = 0; side < 2; ++side) {
                        worker.load(pairs.steps + pairs.starts[2 * m + side] * columns, pairs.lengths[m],
                                    worker.s.x + rows * x_stride);
                        rows += pairs.lengths[m];
                    }
                }
                worker.forward(layers, rows);
                const T* rewards = worker.s.out;
                T* delta = worker.s.deltas[ensemble.num_layers - 1];
                for (std::int64_t m = first; m < first + count; ++m) {
                    const std::int64_t length = pairs.lengths[m];
                    T sums[2] = {T(0), T(0)};
                    for (std::int64_t i = 0; i < 2 * length; ++i) sums[i >= length] += rewards[i * stride];
                    const T logit = sums[1] - sums[0], label = pairs.labels[m];
                    logits[m] = logit;
                    loss += static_cast<double>(math::preference_cross_entropy(logit, label));
                    const T slope = share * math::preference_slope(logit, label);
                    for (std::int64_t i = 0; i < 2 * length; ++i)
                        delta[i * stride] = i < length ? -slope : slope;
                    rewards += 2 * length * stride;
                    delta += 2 * length * stride;
                }
                worker.backward(layers, k, rows, accumulate, nullptr);
            };
            worker.for_each_block_of(k, pairs.offsets[k + 1] - pairs.offsets[k],
                                     block_rows / (2 * pairs.longest), visit);
        }
        losses[worker.me] = loss;
        wait_for_all();
        if (worker.me == 0) used = worker.parts;
        worker.gather(gradients);
    });
    double total = 0;
    for (int p = 0; p < used; ++p) total += losses[p];
    return total / static_cast<double>(pairs.batch_size);
}

#define PARL_INSTANTIATE(T)                                                                               \
    template std::int64_t ensemble_workspace<T>(const Ensemble<T>&, std::int64_t, int);                   \
    template void ensemble_forward<T>(const Ensemble<T>&, const EnsembleInputs<T>&, T*, int, T*);         \
    template void ensemble_forward_few<T>(const Ensemble<T>&, const EnsembleInputs<T>&, T*, T*);          \
    template void ensemble_backward<T>(const Ensemble<T>&, const EnsembleInputs<T>&, const T*, T*, int,   \
                                       const EnsembleGradients<T>&, T*);                                  \
    template double ensemble_preference_gradient<T>(const Ensemble<T>&, const EnsemblePairs<T>&, T*, int, \
                                                    const EnsembleGradients<T>&, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
#undef PARL_INSTANTIATE

}  // namespace parl::cpu::PARL_ISA
