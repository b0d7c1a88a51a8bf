#include "cpu/divergence.h"

#include "cpu/simd.h"

namespace parl::cpu::PARL_ISA {
namespace {

using math::Divergence;

// Below this many elements a thread costs more to wake than it saves.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 15;
constexpr int kMaxParts = 256;
// Elements whose sum is taken in T; the sums of blocks are added in double precision.
constexpr std::int64_t kBlock = 512;
// Sums of float terms beyond this, with weights or without, are taken again in double precision, where single terms
// do not overflow. What is below bounds their derivatives, too, which exceed a large term by small factors only.
constexpr double kFloatTrusted = 1e30;

enum class Output { kNone, kValue, kFirst, kSecond };

// Σ wᵢ gᵢ and Σ gᵢ.
struct Sums {
    double weighted = 0, plain = 0;

    void operator+=(const Sums& other) {
        weighted += other.weighted;
        plain += other.plain;
    }
};

// Up to kBlock elements: returns their sums (for kNone and kFirst) and writes what `kOutput` says, times
// scale·wᵢ.
template <typename T>
using Block = Sums (*)(const T* x, int count, const T* weights, bool flipped, T alpha, T scale, T* out);

template <Divergence kF, bool kOverRatio, Output kOutput, typename T>
Sums block(const T* x, int count, const T* weights, bool flipped, T alpha, T scale, T* out) {
    using V = Vec<T>;
    constexpr int kWidth = V::kWidth;
    // The last elements, where they are fewer than a vector has lanes, take the same way by these. The other
    // lanes are at a ratio of 1, where every f is 0.
    T last_x[kWidth] = {}, last_weights[kWidth] = {}, last_out[kWidth];
    const V scales(scale);
    V total(T(0)), plain(T(0));
    for (int i = 0; i < count; i += kWidth) {
        const T* from = x + i;
        const T* weigh = weights == nullptr ? nullptr : weights + i;
        T* to = out + i;
        if (count - i < kWidth) {
            for (int k = 0; k < count - i; ++k) {
                last_x[k] = from[k];
                if (weights != nullptr) last_weights[k] = weigh[k];
            }
            from = last_x;
            weigh = weights == nullptr ? nullptr : last_weights;
            to = last_out;
        }
        const V r = V::load(from);
        const math::Jet<V> jet = math::divergence_jet<kF, kOverRatio>(flipped ? -r : r, alpha);
        V value = jet.value, result = jet.first;
        if constexpr (kOutput == Output::kValue) result = jet.value;
        if constexpr (kOutput == Output::kSecond) result = jet.second;
        if (weights != nullptr) {
            const V w = V::load(weigh);
            if constexpr (kOutput == Output::kNone || kOutput == Output::kFirst) plain += value;
            value = value * w;
            result = result * w;
        }
        if constexpr (kOutput == Output::kNone || kOutput == Output::kFirst) total += value;
        if constexpr (kOutput != Output::kNone) (result * scales).store(to);
    }
    if constexpr (kOutput != Output::kNone) {
        for (int k = 0; k < count % kWidth; ++k) out[count - count % kWidth + k] = last_out[k];
    }
    const double weighted = static_cast<double>(total.sum());
    return {weighted, weights == nullptr ? weighted : static_cast<double>(plain.sum())};
}

template <Divergence kF, bool kOverRatio, typename T>
Block<T> block_with(Output output) {
    switch (output) {
        case Output::kNone:
            return block<kF, kOverRatio, Output::kNone, T>;
        case Output::kValue:
            return block<kF, kOverRatio, Output::kValue, T>;
        case Output::kFirst:
            return block<kF, kOverRatio, Output::kFirst, T>;
        default:
            return block<kF, kOverRatio, Output::kSecond, T>;
    }
}

template <typename T>
Block<T> block_of(const DivergenceTerm& term, Output output) {
#define PARL_CASE(kF)                                                        \
    case Divergence::kF:                                                     \
        return term.over_ratio ? block_with<Divergence::kF, true, T>(output) \
                               : block_with<Divergence::kF, false, T>(output);
    switch (term.function) {
        PARL_CASE(kKl)
        PARL_CASE(kKlK2)
        PARL_CASE(kKlK3)
        PARL_CASE(kReverseKl)
        PARL_CASE(kReverseKlK2)
        PARL_CASE(kReverseKlK3)
        PARL_CASE(kJensenShannon)
        PARL_CASE(kJeffreys)
        PARL_CASE(kChiSquared)
        PARL_CASE(kNeyman)
        PARL_CASE(kSquaredHellinger)
        PARL_CASE(kTotalVariation)
        PARL_CASE(kAlphaLow)
        PARL_CASE(kAlphaHigh)
    }
#undef PARL_CASE
    return nullptr;
}

// A term in the precision C, on elements of type T.
template <typename T, typename C>
struct Terms {
    Block<C> compute;
    C alpha, scale;
    bool flipped;

    Terms(const DivergenceTerm& term, Output output, double gradient_scale)
        : compute(block_of<C>(term, output)),
          alpha(static_cast<C>(term.alpha)),
          scale(static_cast<C>(output == Output::kFirst && term.flipped ? -gradient_scale : gradient_scale)),
          flipped(term.flipped) {}

    Sums operator()(const T* x, std::int64_t count, const T* weights, T* out) const {
        Sums total;
        for (std::int64_t i = 0; i < count; i += kBlock) {
            const int size = static_cast<int>(count - i < kBlock ? count - i : kBlock);
            total += one_block(x + i, size, weights == nullptr ? nullptr : weights + i,
                               out == nullptr ? nullptr : out + i);
        }
        return total;
    }

    Sums one_block(const T* x, int count, const T* weights, T* out) const {
        if constexpr (sizeof(T) == sizeof(C)) {
            return compute(x, count, weights, flipped, alpha, scale, out);
        } else {
            C wide_x[kBlock], wide_weights[kBlock], wide_out[kBlock];
            for (int i = 0; i < count; ++i) {
                wide_x[i] = x[i];
                if (weights != nullptr) wide_weights[i] = weights[i];
            }
            const Sums total = compute(wide_x, count, weights == nullptr ? nullptr : wide_weights, flipped,
                                       alpha, scale, wide_out);
            if (out != nullptr) {
                for (int i = 0; i < count; ++i) out[i] = static_cast<T>(wide_out[i]);
            }
            return total;
        }
    }
};

int num_parts(std::int64_t elements, int num_threads) {
    if (elements < kParallelElements || num_threads < 2) return 1;
    return num_threads < kMaxParts ? num_threads : kMaxParts;
}

// Where part `part` of `parts` begins, at a multiple of kBlock.
std::int64_t part_start(std::int64_t count, int part, int parts) {
    return part == parts ? count : count / kBlock * part / parts * kBlock;
}

// The first trajectory that begins at `step` or later.
std::int64_t trajectory_at(const std::int64_t* offsets, std::int64_t num_trajectories, std::int64_t step) {
    std::int64_t low = 0, high = num_trajectories;
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (offsets[middle] < step) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// The sum of x[0:count]; x may be read, not used, up to `end`.
template <typename T>
double sum(const T* x, std::int64_t count, const T* end) {
    using V = Vec<T>;
    double total = 0;
    while (count > kBlock) {
        V sums[2] = {V(T(0)), V(T(0))};
        for (int i = 0; i < kBlock; i += 2 * V::kWidth) {
            sums[0] += V::load(x + i);
            sums[1] += V::load(x + i + V::kWidth);
        }
        total += static_cast<double>((sums[0] + sums[1]).sum());
        x += kBlock;
        count -= kBlock;
    }
    V sums(T(0));
    const int left = static_cast<int>(count);
    int i = 0;
    for (; i + V::kWidth <= left; i += V::kWidth) sums += V::load(x + i);
    if (i < left) {
        const V beyond = end - (x + i) >= V::kWidth ? V::load(x + i) : V::load_partial(x + i, left - i);
        sums += select(V::iota() < V(static_cast<T>(left - i)), beyond, V(T(0)));
    }
    return total + static_cast<double>(sums.sum());
}

// Writes value to out[0:count]; what follows, up to `end`, may be overwritten.
template <typename T>
void fill(T* out, std::int64_t count, T value, const T* end) {
    using V = Vec<T>;
    const V values(value);
    std::int64_t i = 0;
    for (; i < count && end - (out + i) >= V::kWidth; i += V::kWidth) values.store(out + i);
    for (; i < count; ++i) out[i] = value;
}

// What a sample counts, but for its weight.
template <typename T>
double each_weighs(const T* weights, std::int64_t samples) {
    return weights == nullptr ? 1.0 / static_cast<double>(samples) : 1.0;
}

template <typename T, typename C>
Sums sum_in(const T* log_ratio, std::int64_t count, const T* weights, const DivergenceTerm& term, double each,
            [[maybe_unused]] int num_threads, T* gradient) {
    const Terms<T, C> terms(term, gradient == nullptr ? Output::kNone : Output::kFirst, each);
    const int parts = num_parts(count, num_threads);
    Sums totals[kMaxParts];
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        const std::int64_t first = part_start(count, part, parts), last = part_start(count, part + 1, parts);
        totals[part] = terms(log_ratio + first, last - first, weights == nullptr ? nullptr : weights + first,
                             gradient == nullptr ? nullptr : gradient + first);
    }
    Sums total;
    for (int part = 0; part < parts; ++part) total += totals[part];
    return total;
}

template <typename T, typename C>
Sums sum_of_trajectories_in(const T* log_ratio, const std::int64_t* offsets, std::int64_t num_trajectories,
                            const T* weights, const DivergenceTerm& term, double each,
                            [[maybe_unused]] int num_threads, T* gradient) {
    const Terms<T, C> terms(term, gradient == nullptr ? Output::kNone : Output::kFirst, each);
    const std::int64_t count = offsets[num_trajectories];
    const int parts = num_parts(count, num_threads);
    Sums totals[kMaxParts];
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        const std::int64_t first =
            part == 0 ? 0 : trajectory_at(offsets, num_trajectories, part_start(count, part, parts));
        const std::int64_t last =
            part + 1 == parts ? num_trajectories
                              : trajectory_at(offsets, num_trajectories, part_start(count, part + 1, parts));
        T sums[kBlock], slopes[kBlock];
        Sums total;
        for (std::int64_t begin = first; begin < last; begin += kBlock) {
            const int size = static_cast<int>(last - begin < kBlock ? last - begin : kBlock);
            for (int i = 0; i < size; ++i) {
                const std::int64_t from = offsets[begin + i], length = offsets[begin + i + 1] - from;
                sums[i] = static_cast<T>(sum(log_ratio + from, length, log_ratio + count));
            }
            total += terms.one_block(sums, size, weights == nullptr ? nullptr : weights + begin,
                                     gradient == nullptr ? nullptr : slopes);
            if (gradient == nullptr) continue;
            for (int i = 0; i < size; ++i) {
                const std::int64_t from = offsets[begin + i], length = offsets[begin + i + 1] - from;
                fill(gradient + from, length, slopes[i], gradient + offsets[last]);
            }
        }
        totals[part] = total;
    }
    Sums total;
    for (int part = 0; part < parts; ++part) total += totals[part];
    return total;
}

template <typename T>
bool is_trusted(const Sums& total) {
    return sizeof(T) == sizeof(double) ||
           (__builtin_fabs(total.weighted) < kFloatTrusted && __builtin_fabs(total.plain) < kFloatTrusted);
}

}  // namespace

template <typename T>
double divergence_sum(const T* log_ratio, std::int64_t count, const T* weights, const DivergenceTerm& term,
                      int num_threads, T* gradient) {
    const double each = each_weighs(weights, count);
    Sums total = sum_in<T, T>(log_ratio, count, weights, term, each, num_threads, gradient);
    if (!is_trusted<T>(total)) {
        total = sum_in<T, double>(log_ratio, count, weights, term, each, num_threads, gradient);
    }
    return total.weighted * each;
}

template <typename T>
double divergence_sum_of_trajectories(const T* log_ratio, const std::int64_t* offsets,
                                      std::int64_t num_trajectories, const T* weights,
                                      const DivergenceTerm& term, int num_threads, T* gradient) {
    const double each = each_weighs(weights, num_trajectories);
    Sums total = sum_of_trajectories_in<T, T>(log_ratio, offsets, num_trajectories, weights, term, each,
                                              num_threads, gradient);
    if (!is_trusted<T>(total)) {
        total = sum_of_trajectories_in<T, double>(log_ratio, offsets, num_trajectories, weights, term, each,
                                                  num_threads, gradient);
    }
    return total.weighted * each;
}

template <typename T>
void divergence_terms(const T* log_ratio, std::int64_t count, const DivergenceTerm& term, int order,
                      [[maybe_unused]] int num_threads, T* out) {
    const Terms<T, T> terms(term,
                            order == 0   ? Output::kValue
                            : order == 1 ? Output::kFirst
                                         : Output::kSecond,
                            1.0);
    const int parts = num_parts(count, num_threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        const std::int64_t first = part_start(count, part, parts), last = part_start(count, part + 1, parts);
        terms(log_ratio + first, last - first, nullptr, out + first);
    }
}

#define PARL_INSTANTIATE(T)                                                                                  \
    template double divergence_sum<T>(const T*, std::int64_t, const T*, const DivergenceTerm&, int, T*);     \
    template double divergence_sum_of_trajectories<T>(const T*, const std::int64_t*, std::int64_t, const T*, \
                                                      const DivergenceTerm&, int, T*);                       \
    template void divergence_terms<T>(const T*, std::int64_t, const DivergenceTerm&, int, int, T*);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)

}  // namespace parl::cpu::PARL_ISA
