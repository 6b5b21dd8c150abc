// Instantiates what decode_kernels.h lists for one instruction set; the same files as for cpu_kernels.inl define DECODE_TABLE too.
#include "decode_cpu.h"
#include "product_cpu.h"

namespace wkv {

const DecodeKernels DECODE_TABLE = {WKV_ISA::product, WKV_ISA::round_row, WKV_ISA::norm_mix, WKV_ISA::token_mix, WKV_ISA::before7,
                                    WKV_ISA::after7, WKV_ISA::before6, WKV_ISA::after6, WKV_ISA::softmax_terms};

}  // namespace wkv
