"""A step of all slots as a GPU needs it: that it looks at no value on the host, and may be done for more rows than there are."""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from src.generation import batch
from src.generation.automaton import Automaton
from src.generation.batch import generate
from src.generation.config import Sampling
from src.generation.graphs import bucket
from src.generation.requests import Request
from src.generation.sampler import TorchSampler
from src.generation.slots import Slots
from src.model import build_model
from src.model.decode import Forward, decoder_for
from src.tokenizer import load_tokenizer
from tests.generation.tiny import PROMPTS, random_model
from tests.random_checkpoint import make_dimensions, random_weights


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("version", ["x060", "x070"])
@torch.no_grad()
def test_a_step_looks_at_no_value_on_the_host(version, quantize):
    """Under fake tensors, which have shapes but no values: what asks for one fails. The sampler is PyTorch's, set as on a GPU."""
    dimensions = make_dimensions(version, n_layer=2, n_embd=64, head_size=32, vocab_size=300)
    model = build_model(random_weights(dimensions), dimensions, torch.bfloat16, quantize=quantize)
    automaton = Automaton(torch.zeros(2, 300, dtype=torch.int16), 1)
    slots = Slots(Forward(model), automaton, torch.ones(300), Sampling(), 4)
    slots.sampler = TorchSampler(4, automaton, torch.ones(300), Sampling(), torch.device("cpu"))
    slots.sampler._candidates = 300
    slots.step(3)  # the borders of three sequences are read once
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert slots.step(3).shape == (2, 3)
        slots.sampler._candidates = 20  # as on a CPU, which looks whether these are enough
        with pytest.raises(DynamicOutputShapeException):
            slots.step(3)


@pytest.mark.parametrize("ahead", [0, 2])
def test_steps_of_more_rows_than_there_are_change_no_text(ahead, monkeypatch):
    """As CUDA graphs do them: slots behind the last row hold rows that have left, or nothing."""
    model, sampling, tokenizer = random_model("x070"), Sampling(top_p=0.95, max_tokens=20, stop=("e",)), load_tokenizer("bytes")
    model.head.weight[ord("e")] *= 5  # likely now and then, so that rows end at different times
    engine = decoder_for(model)
    requests = [Request(row, tuple(PROMPTS[row % 5]), row // 5) for row in range(20)]
    expected = sorted(generate(engine, tokenizer, requests, sampling, 1, 7))
    sizes = []

    def in_buckets(step, size, device):
        return lambda n: sizes.append((n, bucket(n, size))) or step(bucket(n, size))

    monkeypatch.setattr(batch, "Graphs", in_buckets)
    engine.captures, engine.ahead = True, ahead
    assert sorted(generate(engine, tokenizer, requests, sampling, 1, 7)) == expected
    assert {(7, 7), (1, 1)} <= set(sizes) and any(n < size for n, size in sizes)
    assert len({len(answer.tokens) for answer in expected}) > 3
