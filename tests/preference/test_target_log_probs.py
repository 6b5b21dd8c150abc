"""Log-probabilities without logits against log_softmax of the whole logits, values and gradients, for every kind of head."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.adapters.dora import DoRALinear
from src.adapters.linear import Linear
from src.adapters.lora import LoRALinear
from src.preference import target_log_probs as module
from src.preference.target_log_probs import target_log_probs
from src.quantization.linear import quantize_linear

WIDTH, VOCABULARY = 64, 300
# Rounding alone: float64 sums of 300 terms; float32 the same; NF4 and int8 are exact functions of their codes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that even these few rows take several tiles either way, the last ones partial."""
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "TILE_ON_CPU", 7 * 64)


def make_head(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    if kind in ("nf4", "int8"):
        return quantize_linear(weight, kind)
    head = Linear(WIDTH, VOCABULARY, dtype=dtype)
    head.weight.data = weight.to(dtype)
    head.weight.requires_grad_(kind == "full")
    if kind.startswith(("lora", "dora")):
        base = quantize_linear(weight, kind[8:]) if " on " in kind else head
        head = {"lora": LoRALinear, "dora": DoRALinear}[kind[:4]](base, 4, 8.0, 0.0, generator)
        head.lora_B.data = torch.randn(VOCABULARY, 4, generator=generator) * 0.1
        if kind.startswith("dora"):
            head.lora_M.data *= 1 + 0.3 * torch.randn(VOCABULARY, generator=generator)
        head = head.double() if dtype == torch.float64 else head
    return head


def plain(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["frozen", "full", "nf4", "int8", "lora", "lora on nf4", "dora", "dora on nf4", "dora on int8"])
def test_value_and_gradients_are_those_of_the_whole_logits(kind, dtype):
    head = make_head(kind, dtype)
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([0, 63, 64, 127, 192, 255, 256, 299])  # of tiles
    targets = torch.cat([ends, torch.randint(VOCABULARY, (17,), generator=generator)])
    weights = torch.randn(25, generator=generator).to(torch.promote_types(dtype, torch.float32))
    results = []
    for form in (target_log_probs, plain):
        hidden = torch.randn(25, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        log_probs = form(head, hidden, targets)
        assert log_probs.dtype == weights.dtype
        results.append([log_probs, *torch.autograd.grad(log_probs @ weights, leaves)])
        with torch.no_grad():
            assert torch.equal(form(head, hidden, targets), log_probs)
    assert len(results[0]) == {"full": 3, "lora": 4, "dora": 5}.get(kind[:4], 2)
    for ours, theirs in zip(*results, strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() < TOLERANCE[dtype] * theirs.norm()


@pytest.mark.parametrize("kind", ["full", "lora", "dora on nf4"])
def test_a_head_may_train_alone(kind):
    """As with a profile that freezes all below it: nothing needs the gradient of the hidden states."""
    head, generator = make_head(kind, torch.float32), torch.Generator().manual_seed(4)
    hidden, targets = torch.randn(25, WIDTH, generator=generator), torch.randint(VOCABULARY, (25,), generator=generator)
    weights = torch.randn(25, generator=generator)
    leaves = [p for p in head.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(form(head, hidden, targets) @ weights, leaves) for form in (target_log_probs, plain))
    for mine, its in zip(ours, theirs, strict=True):
        assert its.norm() > 0 and (mine - its).norm() < 2e-5 * its.norm()


def test_rows_that_share_a_block_of_nf4_are_never_in_two_tiles():
    """Of a weight 24 wide a block of 64 values has 2 2/3 rows."""
    generator = torch.Generator().manual_seed(6)
    head = quantize_linear(torch.randn(VOCABULARY, 24, generator=generator), "nf4")
    hidden, targets = torch.randn(VOCABULARY, 24, generator=generator, requires_grad=True), torch.arange(VOCABULARY)
    ours, theirs = (form(head, hidden, targets) for form in (target_log_probs, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), hidden)[0] for one in (ours, theirs)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["frozen", "nf4"])
def test_the_backward_of_a_frozen_head_takes_no_product_with_it(kind, monkeypatch):
    head = make_head(kind, torch.float32)
    hidden = torch.randn(25, WIDTH, generator=torch.Generator().manual_seed(5), requires_grad=True)
    log_probs = target_log_probs(head, hidden, torch.arange(25))
    monkeypatch.setattr(head, "rows", None)
    assert torch.autograd.grad(log_probs.sum(), hidden)[0].norm() > 0


@pytest.mark.parametrize("trained", [False, True])
def test_sums_over_tiles_lose_nothing_in_bfloat16(trained):
    """1024 tiles of probability 1/1024 each: sums in bfloat16 would stay at 1/4, where a further tile rounds away."""
    vocabulary = 1024 * 64
    head = Linear(1, vocabulary, dtype=torch.float32 if trained else torch.bfloat16)
    head.weight.data.fill_(1)
    head.weight.data[-1] = 0  # that of the target
    head.weight.requires_grad_(trained)
    hidden = torch.zeros(7, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs = target_log_probs(head, hidden, torch.full((7,), vocabulary - 1))
    assert torch.allclose(log_probs, torch.tensor(float(vocabulary)).log().neg())
    # d log p(t) / d hidden = W_t - sum_v p_v W_v
    assert torch.autograd.grad(log_probs.sum(), hidden)[0].flatten().tolist() == [-1] * 7


def test_a_head_in_mode_dora_is_equation_5_with_constant_norms():
    """arXiv:2402.09353 in float64: softmax of (m V / ||V||) x with V = W + (alpha / r) B A, and autograd's gradients of it."""
    head, generator = make_head("dora", torch.float64), torch.Generator().manual_seed(3)
    hidden = torch.randn(25, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCABULARY, (25,), generator=generator)
    weights = torch.randn(25, generator=generator, dtype=torch.float64)
    v = head.weight.detach() + 8.0 / 4 * head.lora_B @ head.lora_A
    changed = head.lora_M[:, None] * v / torch.linalg.norm(v, dim=1, keepdim=True).detach()
    expected = (hidden @ changed.T).softmax(-1)[torch.arange(25), targets].log()
    leaves = [hidden, head.lora_A, head.lora_B, head.lora_M]
    found = target_log_probs(head, hidden, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)  # logits of size 10, sums of 300 terms
    for ours, theirs in zip(torch.autograd.grad(found @ weights, leaves), torch.autograd.grad(expected @ weights, leaves),
                            strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-11 * theirs.norm()


@settings(max_examples=30)
@given(rows=st.integers(0, 30), vocabulary=st.integers(1, 200), size=st.sampled_from([0.0, 1.0, 1e3, 1e5]),
       seed=st.integers(0, 99))
def test_any_shape_and_any_size_of_logits(rows, vocabulary, size, seed):
    """At 1e5 all but one probability is 0, and the maxima of later tiles dwarf those before."""
    generator = torch.Generator().manual_seed(seed)
    head = Linear(8, vocabulary, dtype=torch.float64)
    head.weight.data = size * torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    head.weight.requires_grad_(False)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    results = []
    for form in (target_log_probs, plain):
        log_probs = form(head, hidden, targets)
        results.append((log_probs, torch.autograd.grad(log_probs.sum(), hidden)[0]))
    for ours, theirs in zip(*results, strict=True):
        # Relative to the logits' own size, whose rounding both have.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * max(1.0, size) ** 2)


MEMORY = """
import resource, sys, torch
from src.adapters.dora import DoRALinear
from src.adapters.linear import Linear
from src.preference.target_log_probs import target_log_probs
head = Linear(64, 65536); head.weight.data.normal_(); head.weight.requires_grad_(sys.argv[1] == "full")
if sys.argv[1] == "dora":
    head = DoRALinear(head, 4, 8.0, 0.0, torch.Generator())
hidden = torch.randn(2048, 64, requires_grad=True)
targets = torch.randint(65536, (2048,))
target_log_probs(head, hidden[:64], targets[:64]).sum().backward()
head.weight.grad = torch.zeros_like(head.weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
target_log_probs(head, hidden, targets).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("kind", ["frozen", "full", pytest.param("dora", marks=pytest.mark.slow)])
def test_peak_memory(kind):
    """2048 rows of 65536 logits would be 512 MB; hidden's gradient is 0.5 MB, a full head's own 16 MB, DoRA's 1 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, kind], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64 + (16 if kind == "full" else 0)
