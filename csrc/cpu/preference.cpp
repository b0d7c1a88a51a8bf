#include "cpu/preference.h"

#include "cpu/simd.h"
#include "math/preference.h"

namespace parl::cpu::PARL_ISA {
namespace {

struct Span {
    std::int64_t begin, end;
};

PARL_INLINE Span segment(const SegmentLayout& layout, std::int64_t member, std::int64_t pair) {
    const std::int64_t base = member * layout.member_stride;
    if (layout.offsets != nullptr) return {base + layout.offsets[pair], base + layout.offsets[pair + 1]};
    const std::int64_t begin = base + pair * layout.stride;
    return {begin, begin + layout.length};
}

template <typename T>
PARL_INLINE T sum(const T* values, Span span) {
    constexpr int kWidth = Vec<T>::kWidth;
    Vec<T> total(T(0));
    std::int64_t i = span.begin;
    for (; i + kWidth <= span.end; i += kWidth) total += Vec<T>::load(values + i);
    if (i < span.end) total += Vec<T>::load_partial(values + i, static_cast<int>(span.end - i));
    return total.sum();
}

}  // namespace

template <typename T>
void preference_loss(const T* first, SegmentLayout first_layout, const T* second, SegmentLayout second_layout,
                     const T* labels, std::int64_t label_stride, std::int64_t members, std::int64_t num_pairs,
                     T* losses, T* logits, std::int64_t* correct) {
    constexpr int kWidth = Vec<T>::kWidth;
    for (std::int64_t k = 0; k < members; ++k) {
        T* const member_logits = logits + k * num_pairs;
        const T* const member_labels = labels + k * label_stride;
        correct[k] = 0;
        for (std::int64_t m = 0; m < num_pairs; ++m) {
            const T logit =
                sum(second, segment(second_layout, k, m)) - sum(first, segment(first_layout, k, m));
            member_logits[m] = logit;
            correct[k] += math::ordered_as_labelled(logit, member_labels[m]);
        }
        for (std::int64_t m = 0; m < num_pairs; m += kWidth) {
            const int count = static_cast<int>(num_pairs - m < kWidth ? num_pairs - m : kWidth);
            const Vec<T> logit = Vec<T>::load_partial(member_logits + m, count);
            const Vec<T> label = Vec<T>::load_partial(member_labels + m, count);
            math::preference_cross_entropy(logit, label).store_partial(losses + k * num_pairs + m, count);
        }
    }
}

template <typename T>
void spread_over_segments(const T* weights, T scale, SegmentLayout layout, std::int64_t members,
                          std::int64_t num_pairs, T* steps) {
    for (std::int64_t k = 0; k < members; ++k) {
        for (std::int64_t m = 0; m < num_pairs; ++m) {
            const T value = scale * weights[k * num_pairs + m];
            const Span span = segment(layout, k, m);
            for (std::int64_t i = span.begin; i < span.end; ++i) steps[i] = value;
        }
    }
}

template void preference_loss<float>(const float*, SegmentLayout, const float*, SegmentLayout, const float*,
                                     std::int64_t, std::int64_t, std::int64_t, float*, float*, std::int64_t*);
template void preference_loss<double>(const double*, SegmentLayout, const double*, SegmentLayout,
                                      const double*, std::int64_t, std::int64_t, std::int64_t, double*,
                                      double*, std::int64_t*);
template void spread_over_segments<float>(const float*, float, SegmentLayout, std::int64_t, std::int64_t,
                                          float*);
template void spread_over_segments<double>(const double*, double, SegmentLayout, std::int64_t, std::int64_t,
                                           double*);

}  // namespace parl::cpu::PARL_ISA
