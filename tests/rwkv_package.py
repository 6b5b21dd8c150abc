"""What the published `rwkv` package computes, as a truth that this project did not write.

The package chooses v7 or v4-v6 by an environment variable read at import, so it runs in a process of its own:
    python tests/rwkv_package.py MODEL.pth STRATEGY SEQUENCES.json OUT.pt
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def package_logits(model: Path, version: str, sequences: list[list[int]], strategy: str = "cpu fp32") -> list:
    """Logits [T, vocab_size] float32 after every token of each sequence, from the `rwkv` package."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "sequences.json"), Path(folder, "logits.pt")
        request.write_text(json.dumps(sequences))
        environment = {**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
        done = subprocess.run([sys.executable, __file__, str(model), strategy, str(request), str(answer)],
                              env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(answer, weights_only=True)


def main() -> None:
    model, strategy, request, answer = sys.argv[1:]
    import torch
    from rwkv.model import RWKV

    network = RWKV(model=model.removesuffix(".pth"), strategy=strategy)
    logits = []
    for tokens in json.loads(Path(request).read_text()):
        out, _ = network.forward(tokens, None, full_output=True) if len(tokens) > 1 else network.forward(tokens, None)
        logits.append(out.float().reshape(len(tokens), -1))
    torch.save(logits, answer)


if __name__ == "__main__":
    main()
