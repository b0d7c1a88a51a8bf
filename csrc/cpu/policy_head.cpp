#include "cpu/policy_head.h"

#include "math/heads.h"

namespace parl::cpu::PARL_ISA {

template <typename T>
PolicyHead<T>::PolicyHead(const Policy<T>& policy, const Steps<T>& steps)
    : head_(policy.head),
      squash_(policy.squash),
      num_steps_(steps.num_steps),
      outputs_(policy.widths[policy.num_layers]),
      stride_(row_stride<T>(outputs_)),
      action_dim_(head_ == Head::kGaussianState ? outputs_ / 2 : outputs_),
      output_(num_steps_ * stride_),
      gradient_(num_steps_ * stride_) {
    for (std::int64_t i = 0; i < num_steps_ * stride_; ++i) gradient_[i] = T(0);
    if (head_ == Head::kCategorical) {
        probabilities_.reserve(num_steps_ * stride_);
        indices_.reserve(num_steps_);
        for (std::int64_t t = 0; t < num_steps_; ++t) indices_[t] = steps.indices[t];
        return;
    }
    actions_.reserve(num_steps_ * action_dim_);
    for (std::int64_t i = 0; i < num_steps_ * action_dim_; ++i) actions_[i] = steps.actions[i];
    if (head_ == Head::kGaussianState) return;
    log_std_.reserve(action_dim_);
    const T* const log_std = head_ == Head::kGaussianGlobal ? policy.params : policy.log_std;
    for (std::int64_t j = 0; j < action_dim_; ++j) log_std_[j] = log_std[j];
    if (head_ == Head::kGaussianGlobal) {
        log_std_gradient_.reserve(num_steps_ * stride_);
        for (std::int64_t i = 0; i < num_steps_ * stride_; ++i) log_std_gradient_[i] = T(0);
    }
}

template <typename T>
void PolicyHead<T>::start(std::int64_t first, std::int64_t last, T* log_prob) {
    for (std::int64_t t = first; t < last; ++t) {
        if (head_ == Head::kCategorical) {
            start_categorical(t, log_prob);
        } else {
            start_gaussian(t, log_prob);
        }
    }
}

template <typename T>
void PolicyHead<T>::start_gaussian(std::int64_t t, T* log_prob) {
    const T* const z = output_.get() + t * stride_;
    T* const gradient = gradient_.get() + t * stride_;
    T total(0);
    for (std::int64_t j = 0; j < action_dim_; ++j) {
        T& action = actions_[t * action_dim_ + j];
        if (squash_) {
            action = math::unsquash(action);
            total -= math::log_tanh_slope(action);
        }
        const bool of_state = head_ == Head::kGaussianState;
        const auto log_std = of_state ? math::state_log_std(z[action_dim_ + j])
                                      : math::StateLogStd<T>{log_std_[j], T(0), T(0)};
        const auto term = math::gaussian_term(action, z[j], log_std.value);
        total += term.log_prob;
        gradient[j] = term.by_mean;
        if (of_state) gradient[action_dim_ + j] = term.by_log_std * log_std.slope;
        if (head_ == Head::kGaussianGlobal) log_std_gradient_[t * stride_ + j] = term.by_log_std;
    }
    log_prob[t] = total;
}

template <typename T>
void PolicyHead<T>::start_categorical(std::int64_t t, T* log_prob) {
    const T* const z = output_.get() + t * stride_;
    T* const p = probabilities_.get() + t * stride_;
    T* const gradient = gradient_.get() + t * stride_;
    T largest = z[0], total(0);
    for (std::int64_t j = 1; j < outputs_; ++j) largest = math::maximum(largest, z[j]);
    for (std::int64_t j = 0; j < outputs_; ++j) total += p[j] = math::exp(z[j] - largest);
    for (std::int64_t j = 0; j < outputs_; ++j) {
        p[j] /= total;
        gradient[j] = -p[j];
    }
    for (std::int64_t j = outputs_; j < stride_; ++j) p[j] = T(0);
    gradient[indices_[t]] += T(1);
    log_prob[t] = z[indices_[t]] - largest - math::log(total);
}

template <typename T>
void PolicyHead<T>::second_order(const Terms<T>& terms, HeadCurvature<T>& curvature) const {
    const auto hessian = [&](std::int64_t t) { return terms.hessian == nullptr ? T(0) : terms.hessian[t]; };
    const auto fisher = [&](std::int64_t t) { return terms.fisher == nullptr ? T(0) : terms.fisher[t]; };
    if (head_ == Head::kCategorical) {
        curvature.weights.reserve(num_steps_);
        for (std::int64_t t = 0; t < num_steps_; ++t) curvature.weights[t] = fisher(t) - hessian(t);
        return;
    }
    const bool of_state = head_ == Head::kGaussianState, global = head_ == Head::kGaussianGlobal;
    curvature.diagonal.reserve(num_steps_ * stride_);
    for (std::int64_t i = 0; i < num_steps_ * stride_; ++i) curvature.diagonal[i] = T(0);
    if (of_state || global) {
        curvature.cross.reserve(num_steps_ * stride_);
        for (std::int64_t i = 0; i < num_steps_ * stride_; ++i) curvature.cross[i] = T(0);
    }
    if (global) {
        curvature.log_std_square.reserve(stride_);
        for (std::int64_t j = 0; j < stride_; ++j) curvature.log_std_square[j] = T(0);
    }
    for (std::int64_t t = 0; t < num_steps_; ++t) {
        const T h = hessian(t), f = fisher(t);
        const T* const z = output_.get() + t * stride_;
        T* const diagonal = curvature.diagonal.get() + t * stride_;
        T* const cross = curvature.cross.get() + t * stride_;
        for (std::int64_t j = 0; j < action_dim_; ++j) {
            const auto log_std = of_state ? math::state_log_std(z[action_dim_ + j])
                                          : math::StateLogStd<T>{log_std_[j], T(1), T(0)};
            const auto term = math::gaussian_term(actions_[t * action_dim_ + j], z[j], log_std.value);
            const T slope = log_std.slope;
            diagonal[j] = h * term.by_mean_mean + f * term.fisher_mean;
            const T square = h * (term.by_log_std_log_std * slope * slope + term.by_log_std * log_std.bend) +
                             f * T(2) * slope * slope;
            if (of_state) {
                diagonal[action_dim_ + j] = square;
                cross[j] = cross[action_dim_ + j] = h * term.by_mean_log_std * slope;
            } else if (global) {
                cross[j] = h * term.by_mean_log_std;
                curvature.log_std_square[j] += square;
            }
        }
    }
}

template <typename T>
void PolicyHead<T>::along(std::int64_t first, std::int64_t last, const T* tangent, const T* log_std_tangent,
                          T* out) const {
    for (std::int64_t t = first; t < last; ++t) {
        const T* const gradient = gradient_.get() + t * stride_;
        const T* const here = tangent + (t - first) * stride_;
        T sum(0);
        for (std::int64_t j = 0; j < outputs_; ++j) sum += gradient[j] * here[j];
        if (head_ == Head::kGaussianGlobal) {
            const T* const by_log_std = log_std_gradient_.get() + t * stride_;
            for (std::int64_t j = 0; j < outputs_; ++j) sum += by_log_std[j] * log_std_tangent[j];
        }
        out[t - first] = sum;
    }
}

template <typename T>
void PolicyHead<T>::cotangent(std::int64_t first, std::int64_t last, const HeadCurvature<T>* curvature,
                              const T* tangent, const T* log_std_tangent, const T* steps, T* out,
                              T* log_std_out) const {
    using V = Vec<T>;
    const bool global = head_ == Head::kGaussianGlobal;
    for (std::int64_t t = first; t < last; ++t) {
        const T* const gradient = gradient_.get() + t * stride_;
        const T* const here = tangent + (t - first) * stride_;
        T* const to = out + (t - first) * stride_;
        if (curvature != nullptr && head_ == Head::kCategorical) {
            const T* const p = probabilities_.get() + t * stride_;
            T mean(0);
            for (std::int64_t j = 0; j < outputs_; ++j) mean += p[j] * here[j];
            for (std::int64_t j = 0; j < outputs_; j += V::kWidth) {
                (V(curvature->weights[t]) * V::load(p + j) * (V::load(here + j) - V(mean))).store(to + j);
            }
        } else if (curvature != nullptr && head_ == Head::kGaussianState) {
            const T* const diagonal = curvature->diagonal.get() + t * stride_;
            const T* const cross = curvature->cross.get() + t * stride_;
            for (std::int64_t j = outputs_; j < stride_; ++j) to[j] = T(0);
            for (std::int64_t j = 0; j < action_dim_; ++j) {
                const T mean = here[j], raw = here[action_dim_ + j];
                to[j] = diagonal[j] * mean + cross[j] * raw;
                to[action_dim_ + j] = diagonal[action_dim_ + j] * raw + cross[j] * mean;
            }
        } else {
            for (std::int64_t j = 0; j < outputs_; j += V::kWidth) {
                V value(T(0));
                if (curvature != nullptr) {
                    value = V::load(curvature->diagonal.get() + t * stride_ + j) * V::load(here + j);
                    if (global) {
                        const V cross = V::load(curvature->cross.get() + t * stride_ + j);
                        value += cross * V::load(log_std_tangent + j);
                        (V::load(log_std_out + j) + cross * V::load(here + j)).store(log_std_out + j);
                    }
                }
                value.store(to + j);
            }
        }
        if (steps == nullptr) continue;
        const V weight(steps[t]);
        for (std::int64_t j = 0; j < outputs_; j += V::kWidth) {
            (V::load(to + j) + weight * V::load(gradient + j)).store(to + j);
            if (!global) continue;
            const V by_log_std = V::load(log_std_gradient_.get() + t * stride_ + j);
            (V::load(log_std_out + j) + weight * by_log_std).store(log_std_out + j);
        }
    }
}

template class PolicyHead<float>;
template class PolicyHead<double>;

}  // namespace parl::cpu::PARL_ISA
