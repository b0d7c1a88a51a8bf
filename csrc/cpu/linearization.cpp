#include "cpu/linearization.h"

namespace parl::cpu {

template <typename T>
Linearization<T>* linearize(const Policy<T>& policy, const Steps<T>& steps, int num_threads) {
    return PARL_DISPATCH(linearize(policy, steps, num_threads));
}

template Linearization<float>* linearize<float>(const Policy<float>&, const Steps<float>&, int);
template Linearization<double>* linearize<double>(const Policy<double>&, const Steps<double>&, int);

}  // namespace parl::cpu
