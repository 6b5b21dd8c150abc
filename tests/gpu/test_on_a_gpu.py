"""The same code on a GPU: against the CPU's float32, and a run from references to adapter."""

import json

import pytest
import torch

from src.adapters.apply import apply_layer_profile, quantized_linears
from src.adapters.layer_profile import auto_layer_profile
from src.checkpoint.base import load_base
from src.model import build_model
from src.preference.config import PrepareConfig
from src.preference.entries import Pair
from src.preference.objective import Objective, pair_losses
from src.preference.prepare import prepare
from src.quantization.strategy import Strategy
from src.training.batches import collate
from src.training.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_logits_on_the_gpu_are_the_cpus(tiny_checkpoints, version, dtype, bound):
    """float32 products may run in TF32 where the user allows it, which tests do not; the rest is rounding of the precision."""
    weights, dimensions = load_base(tiny_checkpoints(version, "trained", 32))
    tokens = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 1, 40, 100], dtype=torch.int32)
    with torch.no_grad():
        expected = build_model(weights, dimensions)
        expected = expected.logits(expected(tokens, borders)[0])
        model = build_model(weights, dimensions, dtype, "cuda")
        logits = model.logits(model(tokens.cuda(), borders)[0]).cpu()
    assert (logits - expected).norm() < bound * expected.norm()


@pytest.fixture
def run(config, material, tmp_path):
    """`run(version, quantization, **flags)`: prepares pairs and trains in bf16 on the GPU; returns the lines of metrics.jsonl."""

    def go(version: str, quantization: str | None = None, **flags) -> list[dict[str, float]]:
        pairs = tmp_path / "pairs.save"
        prepare(PrepareConfig(
            load_model=str(material / f"{version}.pth"), input_csv=str(material / "pairs.csv"), output_save=str(pairs),
            rlhf_max_corpus_len=512, batch_tokens=512, strategy=Strategy(torch.device("cuda"), "bf16", quantization)))
        folder = tmp_path / "_".join(["run", *map(str, flags.values())])
        train(config(version, rlhf_train_file=str(pairs), proj_dir=str(folder), accelerator="gpu", precision="bf16",
                     quantization=quantization, **flags), {})
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return go


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_run_starts_at_margin_zero_and_learns(run, version, quantization, grad_cp):
    metrics = run(version, quantization, grad_cp=grad_cp)
    assert abs(metrics[0]["margin"]) < 0.05  # bf16 products of another batch shape round another way
    assert metrics[-1]["margin"] > metrics[0]["margin"]
    assert metrics[-1]["grad_norm"] > 0


def test_the_8_bit_optimizer_takes_the_same_first_step(run):
    """Its states are float32 in tensors as small as these; the rest is rounding of its own arithmetic."""
    plain, eight = (run("x070", optim=optim)[1] for optim in ("adamw", "adamw_8bit"))
    assert eight["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize(("version", "quantization"), [("x060", None), ("x070", "nf4")])
def test_deepspeed_takes_the_steps_of_one_process(run, version, quantization):
    """Accumulated over two micro-batches, its optimizer on the CPU."""
    plain, offloaded = (run(version, quantization, accumulate_grad_batches=2, strategy=strategy)
                        for strategy in ("auto", "deepspeed_stage_2_offload"))
    assert len(plain) == len(offloaded) == 4 and abs(offloaded[0]["margin"]) < 0.05
    for name, tolerance in (("grad_norm", 1e-2), ("loss", 1e-3)):  # a parameter's last bit may turn a bf16 rounding elsewhere
        assert [line[name] for line in offloaded] == pytest.approx([line[name] for line in plain], rel=tolerance)
    # Before the first step both have the same weights, and only sums over the gradient's parts differ.
    assert offloaded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)


@pytest.fixture
def waiting_fails():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_the_host_waits_nowhere_in_a_micro_batch(tiny_checkpoints, waiting_fails, version, quantization, grad_cp):
    weights, dimensions = load_base(tiny_checkpoints(version, "trained", 32))
    settings = auto_layer_profile(dimensions.n_layer, 1e-3, 1e-4, rank=4, alpha=8.0)
    model = build_model(weights, dimensions, torch.bfloat16, "cuda", quantization, hold=quantized_linears(settings, quantization))
    apply_layer_profile(model, settings, seed=0)
    packed, references = collate([Pair([1, 2, 3], [4, 5], [6], -3.0, -4.0), Pair([], [2] * 40, [3, 4], -7.0, -8.0)])

    def micro_batch() -> None:
        on_gpu = packed.pin_memory().to("cuda"), references.pin_memory().to("cuda", non_blocking=True)
        pair_losses(model, *on_gpu, Objective({"beta": 0.1}, alpha=0.1, sft_on_prompt=True), grad_cp)["loss"].sum().backward()

    micro_batch()  # builds the kernels, and what else happens once
    waiting_fails()
    micro_batch()
