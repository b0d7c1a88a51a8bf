#include "cpu/neighbours.h"

#include "cpu/simd.h"

namespace parl::cpu::PARL_ISA {
namespace {

constexpr int kVectors = kStatesInBlock / Vec<float>::kWidth;

// Squared distances of `state` (its coordinates kStatesInBlock apart) to the states of a block.
PARL_INLINE void squared_distances(const float* block, const float* state, std::int64_t dim, float* out) {
    using V = Vec<float>;
    V sums[kVectors];
    for (V& sum : sums) sum = V(0.0F);
    for (std::int64_t c = 0; c < dim; ++c) {
        const V own(state[c * kStatesInBlock]);
        for (int v = 0; v < kVectors; ++v) {
            const V difference = V::load(block + c * kStatesInBlock + v * V::kWidth) - own;
            sums[v] += difference * difference;
        }
    }
    for (int v = 0; v < kVectors; ++v) sums[v].store(out + v * V::kWidth);
}

// Enters `distance` into the ascending list at `list`, whose last entry is greater.
PARL_INLINE void enter(float distance, float* list, std::int64_t k, std::int64_t stride) {
    std::int64_t place = k - 1;
    for (; place > 0 && list[(place - 1) * stride] > distance; --place) {
        list[place * stride] = list[(place - 1) * stride];
    }
    list[place * stride] = distance;
}

}  // namespace

void find_neighbours(const Neighbours& all, std::int64_t row, bool mutual) {
    const std::int64_t last = (all.k - 1) * all.stride;
    const float* state = all.states + row / kStatesInBlock * all.dim * kStatesInBlock + row % kStatesInBlock;
    float* const own = all.nearest + row;
    for (std::int64_t j = 0; j < all.k; ++j) own[j * all.stride] = __builtin_huge_valf();
    for (std::int64_t start = 0; start < all.num; start += kStatesInBlock) {
        float distances[kStatesInBlock];
        squared_distances(all.states + start * all.dim, state, all.dim, distances);
        const float* const farthest = all.nearest + last + start;
        // Most blocks have nothing to enter: one look at all lanes, those past the end included.
        int entering = 0;
        for (int lane = 0; lane < kStatesInBlock; ++lane) {
            entering |= static_cast<int>(distances[lane] < own[last]) |
                        static_cast<int>(mutual && distances[lane] < farthest[lane]);
        }
        if (entering == 0) continue;
        for (std::int64_t i = start; i < start + kStatesInBlock && i < all.num; ++i) {
            if (i == row) continue;
            const float distance = distances[i - start];
            if (distance < own[last]) enter(distance, own, all.k, all.stride);
            if (mutual && distance < all.nearest[last + i])
                enter(distance, all.nearest + i, all.k, all.stride);
        }
    }
}

}  // namespace parl::cpu::PARL_ISA
