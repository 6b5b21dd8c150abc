// Which set of instructions the CPU's kernels use: the highest that torch uses here, unless another was chosen.
#pragma once

#include "cpu_kernels.h"
#include "decode_kernels.h"

namespace wkv {

const CpuKernels& cpu_kernels();
const DecodeKernels& kernels();

}  // namespace wkv
