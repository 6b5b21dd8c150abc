"""Writing text on a GPU: the sampling kernel, steps that never wait, graphs that change no text, the CPU's texts in float32."""

import pytest
import torch

from src import kernels
from src.checkpoint.base import load_base
from src.generation import batch
from src.generation.automaton import Automaton
from src.generation.batch import generate
from src.generation.config import Sampling
from src.generation.graphs import WARM_UPS, Graphs, bucket
from src.generation.requests import Request
from src.generation.sampler import KernelSampler, TorchSampler
from src.generation.slots import Slots
from src.model import build_model
from src.model.decode import decoder_for
from src.tokenizer import load_tokenizer
from tests.generation.draws import SETTINGS, check_draws
from tests.generation.tiny import PROMPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
REQUESTS = [Request(row, tuple(prompt), sample) for row, prompt in enumerate(PROMPTS) for sample in range(3)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("sampler", [KernelSampler, TorchSampler])
def test_every_draw_is_right(sampler, settings, scale):
    assert kernels.missing("cuda") is None
    check_draws(sampler, settings, scale, vocab_size=3001, device="cuda")


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_step_never_waits_for_the_host(tiny_checkpoints, version, dtype, quantize):
    """Neither as it is nor as a graph; torch itself tells where something waits."""
    model = build_model(*load_base(tiny_checkpoints(version, "trained", 32)), dtype, "cuda", quantize)
    with torch.inference_mode():
        slots = Slots(decoder_for(model), Automaton(torch.zeros(1, 256, dtype=torch.int16), 0), torch.ones(256), Sampling(), 5)
        slots.sampler.enter(0, torch.rand(5, Sampling().max_tokens, dtype=torch.float64))
        step = Graphs(slots.step, 5, slots.hidden.device)
        for _ in range(WARM_UPS + 1):
            slots.step(3), step(3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                slots.step(3), step(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "quantize"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
                                                 (torch.bfloat16, "nf4"), (torch.bfloat16, "int8"), (torch.float16, "int8")])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_graphs_change_no_text(tiny_checkpoints, version, dtype, quantize, monkeypatch):
    """Of rows that come and go, beside the same steps of the same sizes without a graph."""
    model = build_model(*load_base(tiny_checkpoints(version, "trained", 32)), dtype, "cuda", quantize,
                        quantize_head=quantize == "int8")
    engine = decoder_for(model)
    assert engine.captures and engine.ahead
    texts = {}
    for name, steps in (("graphs", Graphs), ("plain", lambda step, size, device: lambda n: step(bucket(n, size)))):
        monkeypatch.setattr(batch, "Graphs", steps)
        sampling = Sampling(top_p=0.9, max_tokens=60)
        texts[name] = sorted(generate(engine, load_tokenizer("bytes"), REQUESTS, sampling, 0, 7))
    assert texts["graphs"] == texts["plain"] and len({answer.text for answer in texts["graphs"]}) > 3


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_texts_are_the_cpus(tiny_checkpoints, version):
    """Greedy, float32: two outcomes within rounding of each other are unlikely over 60 tokens of a trained model."""
    weights, dimensions = load_base(tiny_checkpoints(version, "trained", 32))
    sampling, tokenizer = Sampling(temperature=0, max_tokens=60), load_tokenizer("bytes")
    texts = [{answer[:2]: answer.text for answer in generate(decoder_for(build_model(weights, dimensions, torch.float32, device)),
                                                             tokenizer, REQUESTS, sampling, 0, 4)} for device in ("cpu", "cuda")]
    assert texts[0] == texts[1]
