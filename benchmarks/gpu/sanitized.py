"""One forward and backward of the chunked kernels over 80 tokens, v6 and v7, and one step: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck --kernel-regex kns=wkv python benchmarks/gpu/sanitized.py
"""

import os

# Each tensor in an allocation of its own, so that reading past its end is an error.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from shapes import need_a_gpu

from src import kernels
from src.wkv import wkv6, wkv6_step, wkv7, wkv7_step


def main() -> None:
    need_a_gpu()
    if (reason := kernels.missing("cuda")) is not None:
        raise SystemExit(reason)
    borders, generator = torch.tensor([0, 63, 80], dtype=torch.int32), torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    for tokens in (80, 2):
        r, k, v, a = (draw(tokens, 2, 64) for _ in range(4))
        log_w = -0.6 * draw(tokens, 2, 64, dtype=torch.float32).sigmoid()
        kappa = torch.nn.functional.normalize(draw(tokens, 2, 64), dim=-1)
        state, u = draw(2, 2, 64, 64, dtype=torch.float32), draw(2, 64, dtype=torch.float32)
        forms = {"v6": (wkv6, wkv6_step, (r, log_w, k, v, u)), "v7": (wkv7, wkv7_step, (r, log_w, k, v, kappa, a.sigmoid()))}
        for recurrence, step, inputs in forms.values():
            if tokens == 2:
                step(*inputs, state=state.clone())
                continue
            leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
            y, final = recurrence(*leaves[:-1], state=leaves[-1], cu_seqlens=borders)
            torch.autograd.grad(y.float().sum() + final.sum(), leaves)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
