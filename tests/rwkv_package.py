"""What the published `rwkv` package computes, as a truth that this project did not write.

The package chooses v7 or v4-v6 by an environment variable read at import, so it runs in a process of its own:
    python tests/rwkv_package.py
That process answers until its stdin ends, since importing torch takes longer than tiny models do: a line {"strategy", "requests",
"answers"}, each request about a model of its own, by a line once the answers are in that file.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def package_logits(model: Path, version: str, sequences: list[list[int]], strategy: str = "cpu fp32") -> list:
    """Logits [T, vocab_size] float32 after every token of each sequence, from the `rwkv` package."""
    return package_logits_of_many([(model, sequences)], version, strategy)[0]


def package_logits_from_state(model: Path, version: str, states: Path, tokens: list[int]):
    """Logits [T, vocab_size] after every token, begun from a file of tuned states; for v7, since v6 reads them from its model."""
    return _ask([{"model": str(model), "sequences": [tokens], "states": str(states)}], version, "cpu fp32")[0][0]


def package_logits_of_many(requests: list[tuple[Path, list[list[int]]]], version: str, strategy: str = "cpu fp32") -> list[list]:
    """`package_logits` of each (model, sequences), all models of one version."""
    return _ask([{"model": str(model), "sequences": sequences} for model, sequences in requests], version, strategy)


def package_generate(model: Path, version: str, prompts: list[list[int]], count: int, arguments: dict,
                     strategy: str = "cpu fp32") -> list[list[int]]:
    """The `count` tokens that `PIPELINE.generate` draws after each prompt of byte tokens; `arguments` are its PIPELINE_ARGS."""
    return _ask([{"model": str(model), "prompts": prompts, "count": count, "arguments": arguments}], version, strategy)[0]


def _ask(requests: list[dict], version: str, strategy: str) -> list:
    import torch

    process = _package(version)
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.pt")
        process.stdin.write(json.dumps({"strategy": strategy, "requests": requests, "answers": str(answers)}) + "\n")
        process.stdin.flush()
        said = process.stdout.readline()
        assert said == "answered\n", said or "the package's process has ended"
        return torch.load(answers, weights_only=True)


@functools.cache
def _package(version: str) -> subprocess.Popen:
    environment = {**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
    process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    atexit.register(process.communicate)
    return process


def main() -> None:
    told, sys.stdout = sys.stdout, sys.stderr  # the package prints what it loads
    for line in sys.stdin:
        try:
            _answer(**json.loads(line))
        except Exception as error:
            print(repr(error), file=told, flush=True)
        else:
            print("answered", file=told, flush=True)


def _answer(strategy: str, requests: list[dict], answers: str) -> None:
    import torch
    from rwkv.model import RWKV

    found = []
    for request in requests:
        network = RWKV(model=request["model"].removesuffix(".pth"), strategy=strategy)
        if "prompts" in request:
            found.append([_generate(network, prompt, request) for prompt in request["prompts"]])
        else:
            found.append([_logits(network, tokens, request.get("states")) for tokens in request["sequences"]])
    torch.save(found, answers)


def _logits(network, tokens: list[int], states: str | None = None):
    import torch

    state = None
    if states:
        state, tuned = network.generate_zero_state(), torch.load(states, weights_only=True)
        for layer in range(len(tuned)):
            state[3 * layer + 1] = tuned[f"blocks.{layer}.att.time_state"]
    out, _ = network.forward(tokens, state, full_output=True) if len(tokens) > 1 else network.forward(tokens, state)
    return out.float().reshape(len(tokens), -1)


class _Bytes:
    """As much of a tokenizer as PIPELINE needs; prompts are token lists already."""

    def encode(self, tokens: list[int]) -> list[int]:
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def _generate(network, prompt: list[int], request: dict) -> list[int]:
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    pipeline, drawn = PIPELINE.__new__(PIPELINE), []  # its __init__ only loads a tokenizer
    pipeline.model, pipeline.tokenizer = network, _Bytes()
    sample = pipeline.sample_logits
    pipeline.sample_logits = lambda *args, **kwargs: drawn.append(sample(*args, **kwargs)) or drawn[-1]
    pipeline.generate(prompt, token_count=request["count"], args=PIPELINE_ARGS(**request["arguments"]))
    return drawn


if __name__ == "__main__":
    main()
