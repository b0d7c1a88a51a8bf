// Whether a machine's driver and GPU can run these kernels.
#pragma once

#include <string>

namespace parl::cuda {

// Why the kernels cannot run on the current device, as a clause, or nothing if they can: the driver must be recent
// enough for CUDA's runtime, which is linked in, and for the code that was compiled for this GPU. Makes the device's
// context, if there is none.
std::string why_not();

}  // namespace parl::cuda
