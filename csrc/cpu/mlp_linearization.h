// The linearization of a multi-layer perceptron policy (linearization.h).
//
// How this differs from automatic differentiation, and why:
// 1. The activations of one forward pass serve all products; a Hessian product with fixed weights also keeps
//    the gradients that were handed back, so that 2 matrix products in the first layer and 6 in every other
//    are left.
// 2. Products of tangents and values come in pairs, AḂ + ȦB, and are one loop each (gemm.h).
// 3. Some 100 steps at a time go through all layers, forwards and backwards, while they are in the caches.
//    Each thread has a fixed range of steps and sums parameter gradients of its own, which are then added in
//    order.
#pragma once

#include "cpu/policy_head.h"
#include "cpu/threads.h"

namespace parl::cpu::PARL_ISA {

// What one thread computes with: a block's matrices by layer, and sums over the thread's steps.
template <typename T>
struct Work {
    T** tangents;      // of hidden layers' activations
    T** deltas;        // of all layers' outputs before the activation: gradients, or their tangents
    const T** hidden;  // the block's rows of the linearization's
    const T** slopes;
    T** gradients;        // of all layers' parameters
    T** passed_tangents;  // the block's rows of such matrices of all steps
    T** passed_deltas;
    T* log_std;  // gradient of a free log_std
    T* output;   // tangent of the last layer
    T* scratch;
};

template <typename T>
class MlpLinearization final : public Linearization<T> {
  public:
    MlpLinearization(const Policy<T>& policy, const Steps<T>& steps, int num_threads);

    std::int64_t num_params() const override { return num_params_; }
    std::int64_t num_steps() const override { return num_steps_; }
    std::int64_t num_trajectories() const override { return num_trajectories_; }
    const T* log_prob() const override { return log_prob_.get(); }
    void jvp(const T* v, T* out, int num_threads) override;
    void vjp(const T* w, T* out, int num_threads) override;
    void scores(const T* w, T* out, int num_threads) override;
    Curvature<T>* curvature(const Terms<T>& terms, int num_threads) override;

  private:
    template <typename U>
    friend class MlpCurvature;

    struct Block {
        std::int64_t first, rows;
    };

    // Threads worth waking, and their memory.
    int prepare(int num_threads);
    // Calls function(Block) for the blocks of this thread's steps, in order.
    template <typename Function>
    void for_blocks(Team team, const Function& function) const;
    // The same for blocks of whole trajectories: function(Block, first, last), with the trajectories first …
    // last − 1.
    template <typename Function>
    void for_whole_blocks(Team team, const Function& function) const;
    // Whether trajectories are short enough for that, and can be shared out evenly.
    bool has_whole_blocks(int threads) const;
    // The trajectory at which a thread begins that has whole ones.
    std::int64_t first_trajectory(int thread, int threads) const;
    // Points work.hidden and work.slopes to the block.
    void enter(Work<T>& work, Block block) const;
    // The layers of v (P,), packed; without a barrier.
    void pack_tangents(const T* v, bool with_backward, Team team);
    // ȧ of the block's hidden layers into `tangents`, and the output's tangent. With `bends`, of a Hessian
    // product, what the activations' second derivatives make of them goes into `bent`.
    void tangent_forward(Block block, const Work<T>& work, T* const* bends, T* const* tangents,
                         T* const* bent, T* output) const;
    // The threads' gradients together: (P,).
    void gather(T* out, Team team) const;
    void zero_log_std(Work<T>& work) const;
    void zero_gradients(Work<T>& work) const;
    void write_scores(std::int64_t trajectory, const T* w, Work<T>& work, T* row) const;

    const T* at(T* const* matrices, int layer, std::int64_t row) const {
        return matrices[layer] + row * row_stride<T>(layers_[layer].outputs);
    }
    const T* observations(std::int64_t row) const {
        return x_.get() + row * row_stride<T>(layers_[0].inputs);
    }

    int num_layers_;
    Activation activation_;
    std::int64_t num_steps_, num_trajectories_, num_params_, block_rows_;
    PolicyHead<T> head_;
    Buffer<std::int64_t> offsets_;
    Buffer<T> x_, packed_, cache_, log_prob_;
    Buffer<Layer<T>> layers_;
    // By hidden layer, of all steps; the last two if the activation needs them.
    Buffer<T*> hidden_, slopes_, bends_;

    Buffer<Layer<T>> tangents_;  // the layers of v
    Buffer<T> packed_tangents_;
    Buffer<T> log_std_tangent_;  // padded
    Buffer<Work<T>> works_;
    Buffer<T*> pointers_;
    Buffer<const T*> constant_pointers_, parts_;  // parts_: each layer's gradients of all threads
    Buffer<T> memory_;
    int prepared_ = 0;
};

template <typename T>
template <typename Function>
PARL_INLINE void MlpLinearization<T>::for_blocks(Team team, const Function& function) const {
    const std::int64_t begin = num_steps_ * team.thread / team.threads;
    const std::int64_t end = num_steps_ * (team.thread + 1) / team.threads;
    const std::int64_t blocks = (end - begin + block_rows_ - 1) / block_rows_;
    for (std::int64_t i = 0; i < blocks; ++i) {
        const std::int64_t first = begin + (end - begin) * i / blocks;
        function(Block{first, begin + (end - begin) * (i + 1) / blocks - first});
    }
}

template <typename T>
template <typename Function>
PARL_INLINE void MlpLinearization<T>::for_whole_blocks(Team team, const Function& function) const {
    const std::int64_t end = first_trajectory(team.thread + 1, team.threads);
    std::int64_t first = first_trajectory(team.thread, team.threads);
    while (first < end) {
        std::int64_t last = first + 1;
        while (last < end && offsets_[last + 1] - offsets_[first] <= block_rows_) ++last;
        const Block block{offsets_[first], offsets_[last] - offsets_[first]};
        if (block.rows > 0) function(block, first, last);
        first = last;
    }
}

}  // namespace parl::cpu::PARL_ISA
