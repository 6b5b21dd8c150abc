"""Writing text on a GPU: the graphs' step is the model's own forward, and texts in float32 are the CPU's."""

import pytest
import torch

from src.checkpoint.base import load_base
from src.generation.batch import Request, generate
from src.generation.config import Sampling
from src.model import build_model
from src.model.cuda_graph import Graphs
from src.model.decode import Forward, serve
from src.tokenizer import load_tokenizer
from tests.generation.tiny import PROMPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@torch.inference_mode()
def test_a_graphs_step_is_the_models(tiny_checkpoints, version, dtype, bound):
    """Batches that grow and shrink, each bucket captured in the middle of a text; rounding of the precision apart."""
    weights, dimensions = load_base(tiny_checkpoints(version, "trained", 32))
    model = build_model(weights, dimensions, dtype, "cuda")
    graphs, plain = serve(model), Forward(model)
    assert isinstance(graphs, Graphs)
    ours, truth = graphs.fresh(7), plain.fresh(7)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 1, 2, 5, 5, 7, 3, 4, 7):
        tokens, borders = torch.randint(0, 256, (n,), generator=generator).cuda(), torch.arange(n + 1, dtype=torch.int32)
        found, expected = graphs.advance(tokens, borders, ours.rows(0, n)), plain.advance(tokens, borders, truth.rows(0, n))
        assert (found - expected).float().norm() < bound * expected.float().norm()
        for slots in (ours, truth):  # slots behind the last row may hold anything
            slots.rows(n, 7).copy_(graphs.fresh(1))


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_texts_are_the_cpus(tiny_checkpoints, version):
    """Greedy, float32: two outcomes within rounding of each other are unlikely over 60 tokens of a trained model."""
    weights, dimensions = load_base(tiny_checkpoints(version, "trained", 32))
    requests = [Request(row, tuple(prompt)) for row, prompt in enumerate(PROMPTS)]
    sampling, tokenizer = Sampling(temperature=0, max_tokens=60), load_tokenizer("bytes")
    texts = [{answer.row: answer.text for answer in generate(serve(build_model(weights, dimensions, torch.float32, device)),
                                                             tokenizer, requests, sampling, 0, 4)} for device in ("cpu", "cuda")]
    assert texts[0] == texts[1]
