#include <algorithm>

#include "cuda/launch.h"
#include "cuda/mlp_fused.h"

namespace parl::cuda {
namespace {

FusedLayout lay_out(const Network& network, int rows, bool has_hessian) {
    FusedLayout layout{};
    layout.rows = rows;
    std::int64_t used = 0;
    const auto take = [&](std::int64_t size) {
        const auto at = static_cast<int>(used);
        used += (size + 3) / 4 * 4;
        return at;
    };
    for (int l = 0; l < network.num_layers; ++l) {
        const LayerShape& layer = network.layers[l];
        const std::int64_t size = padded(layer.outputs) * (padded(layer.inputs) + std::int64_t{1});
        layout.weights[l] = take(size);
        layout.weight_tangents[l] = take(size);
        layout.inputs[l] = take(rows * padded(layer.inputs));
        if (l > 0) layout.input_tangents[l] = take(rows * padded(layer.inputs));
        layout.deltas[l] = take(rows * padded(layer.outputs));
        if (has_hessian) layout.kept[l] = take(rows * padded(layer.outputs));
    }
    layout.output_tangents = take(rows * padded(network.last().outputs));
    if (network.free_log_std > 0) layout.log_std = take(rows * padded(network.free_log_std));
    layout.elements = used;
    return layout;
}

}  // namespace

template <typename T>
FusedLayout fused_layout(const Network& network, std::int64_t num_steps, bool has_hessian) {
    for (int l = 0; l < network.num_layers; ++l) {
        // What cannot fit anyway, and would not be counted in an int.
        if (network.layers[l].inputs > 1024 || network.layers[l].outputs > 1024) return {};
    }
    int device = 0, bytes = 0, processors = 0;
    check(cudaGetDevice(&device), "the current device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "a device's shared memory");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "a device's number of multiprocessors");
    // The largest tile that leaves no multiprocessor idle: weights are read once for each.
    int rows = kMaxTileRows;
    while (rows > 16 && num_steps <= std::int64_t{rows} / 2 * processors) rows /= 2;
    for (; rows >= 16; rows /= 2) {
        FusedLayout layout = lay_out(network, rows, has_hessian);
        if (layout.elements * static_cast<std::int64_t>(sizeof(T)) > bytes) continue;
        // Two to a multiprocessor, where tiles are small enough for that.
        layout.blocks = std::min<std::int64_t>((num_steps + rows - 1) / rows, 2 * processors);
        return layout;
    }
    return {};
}

template FusedLayout fused_layout<float>(const Network&, std::int64_t, bool);
template FusedLayout fused_layout<double>(const Network&, std::int64_t, bool);

}  // namespace parl::cuda
