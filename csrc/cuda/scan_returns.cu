#include "cuda/scan.h"
#include "cuda/scan_launch.cuh"

namespace parl::cuda {

template <typename T>
void lambda_returns(const Returns<T>& returns, Segments segments, bool add_values, T* out,
                    ScanWorkspace workspace, cudaStream_t stream) {
    const LambdaReturnsOp<T> op{returns, out, returns.discount * returns.trace_lambda, add_values};
    scan(op, segments, {returns.rewards, returns.values, out}, workspace, stream);
}

template <typename T>
void vtrace(const Returns<T>& returns, const T* log_ratios, Clips clips, Segments segments, T* targets,
            T* advantages, ScanWorkspace workspace, cudaStream_t stream) {
    const VTraceOp<T> op{returns, log_ratios, clips, targets, advantages};
    scan(op, segments, {returns.rewards, returns.values, log_ratios, targets, advantages}, workspace, stream);
}

#define PARL_INSTANTIATE(T)                                                                              \
    template void lambda_returns<T>(const Returns<T>&, Segments, bool, T*, ScanWorkspace, cudaStream_t); \
    template void vtrace<T>(const Returns<T>&, const T*, Clips, Segments, T*, T*, ScanWorkspace,         \
                            cudaStream_t);
PARL_INSTANTIATE(float)
PARL_INSTANTIATE(double)
PARL_INSTANTIATE(BFloat16)

}  // namespace parl::cuda
