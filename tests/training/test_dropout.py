"""Dropout as runs show it: how much is dropped, that what stays is scaled up, and that held-out numbers are without it."""

import math

import pytest
import torch
from torch import Tensor

from tests.plain_model import log_probs
from tests.training.outside import changed_adapter, lines, run

pytestmark = pytest.mark.usefixtures("no_pictures")
P, RANK, ALPHA = 0.3, 1, 6.0
PROMPT, CHOSEN = [11, 12, 13], [21]


@pytest.fixture
def still(tiny_checkpoints, tmp_path):
    """`still(name, rows, flags)`: a run in the folder of this name, on one pair, at rates of 0; `rows` are blocks' and head's."""
    torch.save([(PROMPT, CHOSEN, [31, 32], -5.0, -9.0)], tmp_path / "pairs.save")

    def still(name: str, rows: tuple[str, str, str], flags: dict) -> list[dict]:
        profile = "\n".join(f"{layer},{row}" for layer, row in zip(("emb", "0", "1", "head"), ("freeze", *rows), strict=True))
        (tmp_path / f"{name}.csv").write_text(f"Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final\n{profile}\n")
        return run(tmp_path / name, {
            "load_model": tiny_checkpoints("x070", "random", 16), "rlhf_train_file": tmp_path / "pairs.save",
            "accelerator": "cpu", "samples": 0, "layer_profile": tmp_path / f"{name}.csv"} | flags)[0]

    return still


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_an_input_is_dropped_at_its_rate_and_scaled_up_where_it_stays(still, tiny_checkpoints, tmp_path, mode):
    """The adapter is the head's, and looks at one input alone: what a token's logits get from it is nothing, or 1 / (1 - p) of
    what it would be without dropout."""
    def rows(p: float) -> tuple[str, str, str]:
        return "freeze", "freeze", f"{mode},{RANK},{ALPHA},{p},0,0"

    def of_one_input(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("lora_A"):
            return torch.zeros_like(tensor).index_fill_(1, torch.tensor([5]), 0.5)
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) if name.endswith("lora_B") else tensor

    still("start", rows(0), {"epoch_steps": 1})
    trained = changed_adapter(tmp_path / "start" / "rwkv-final.safetensors", tmp_path / "start.safetensors", of_one_input)
    steps, flags = 150, {"load_adapter": tmp_path / "start.safetensors"}
    told = [line["sft_loss"] for line in still("run", rows(P), flags | {"epoch_steps": steps})]

    base = {name: x.double() for name, x in torch.load(tiny_checkpoints("x070", "random", 16), weights_only=True).items()}
    weight, product = base["head.weight"], trained["head.lora_B"].double() @ trained["head.lora_A"].double() * ALPHA / RANK
    # DoRA's magnitudes and norms are those of the whole weight, which no mask changes.
    factor = trained["head.lora_M"].double() / (weight + product).norm(dim=1) if mode == "dora" else torch.ones(len(weight))
    possible = [-log_probs(base | {"head.weight": factor[:, None] * (weight + scale * product)}, PROMPT + CHOSEN)[-1].item()
                for scale in (0.0, 1 / (1 - P))]
    assert abs(possible[0] - possible[1]) > 0.1
    dropped, kept = (sum(loss == pytest.approx(one, abs=1e-4) for loss in told) for one in possible)
    assert dropped + kept == steps
    # Five standard errors of a share.
    assert abs(dropped / steps - P) < 5 * math.sqrt(P * (1 - P) / steps)


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_held_out_numbers_are_without_dropout(still, tmp_path, mode):
    def rows(p: float) -> tuple[str, str, str]:
        return (f"{mode},4,8,{p},0,0",) * 3

    def elsewhere(name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))

    still("start", rows(0), {"epoch_steps": 1})
    changed_adapter(tmp_path / "start" / "rwkv-final.safetensors", tmp_path / "start.safetensors", elsewhere)
    flags = {"epoch_steps": 2, "epoch_count": 2, "load_adapter": tmp_path / "start.safetensors",
             "eval_file": tmp_path / "pairs.save"}
    plain, dropping = still("plain", rows(0), flags), still("dropping", rows(0.5), flags)
    assert len({line["loss"] for line in plain}) == 1 and len({line["loss"] for line in dropping}) == 4
    held_out = [line | {"step": 0} for name in ("plain", "dropping") for line in lines(tmp_path / name / "eval.jsonl")]
    # The same computation each time, on the same weights.
    assert len(held_out) == 6 and all(line == pytest.approx(held_out[0], rel=1e-6) for line in held_out)
    assert held_out[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
