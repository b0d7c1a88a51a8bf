// Sweeps over flat vectors for Krylov methods: what one iteration does to each element, in one pass each.
//
// A is an operator's product plus damping·I. Elements [begin, end) are swept, so that threads can share a
// vector; sums over them are float64, of short runs in T.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace parl::cpu {

struct CurvatureSums {
    double curvature;  // p·A p
    double direction;  // p·p
    double image;      // A p·A p
};

struct ResidualSums {
    double residual;  // r·r
    double x;         // x·x
};

PARL_IN_EACH_ISA(
    // r·r.
    template <typename T> double square_sweep(const T* r, std::int64_t begin, std::int64_t end);
    // image, the product with p, becomes A p.
    template <typename T>
    CurvatureSums curvature_sweep(const T* p, T damping, T* image, std::int64_t begin, std::int64_t end);
    // x += step·p and r −= step·A p; r·r.
    template <typename T>
    double step_sweep(T step, const T* p, const T* image, T* x, T* r, std::int64_t begin, std::int64_t end);
    // p = r + ratio·p.
    template <typename T>
    void direction_sweep(const T* r, T ratio, T* p, std::int64_t begin, std::int64_t end);
    // image, the product with x, becomes the residual rhs − A x.
    template <typename T> ResidualSums residual_sweep(const T* rhs, const T* x, T damping, T* image,
                                                      std::int64_t begin, std::int64_t end);)

}  // namespace parl::cpu
