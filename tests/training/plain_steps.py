"""A training run by hand: adapters, losses, clipping, AdamW and schedule in float64, from the papers and what the flags mean.

Nothing of src/ has a part in it. It reads what a run was given and what it wrote, and says what should have been written.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from tests.plain_model import Weights, log_probs

# Large matrices, which alone have weight decay: linear weights, embedding, head, and those of adapters.
MATRIX = re.compile(r"(emb|head|att\.(receptance|key|value|output|gate)|ffn\.(key|value|receptance))\.weight|\.lora_[AB]|\.disha")
Numbers = dict[str, Tensor]


def adapted(base: Weights, tensors: Weights, rank: int, alpha: float) -> dict[str, Tensor]:
    """The model that a base and an adapter file's tensors make together, by the adapters' definitions.

    LoRA (arXiv:2106.09685, equation 3), DoRA (arXiv:2402.09353, equation 5, the norm a constant by section 4.3), PiSSA
    (arXiv:2404.02948), Bone (arXiv:2409.15371: every shard of the inputs has D beside it); any other tensor is the weight itself.
    """
    weights = {**base, **{name: tensor for name, tensor in tensors.items() if name in base or name.endswith("time_state")}}
    for name in {name.rpartition(".")[0] for name in tensors.keys() - weights.keys()}:
        of = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("lora_A", "lora_B", "lora_M", "start_A", "start_B", "disha")
              if f"{name}.{leaf}" in tensors}
        weight = base[f"{name}.weight"]
        if "disha" in of:
            weight = torch.stack([weight[:, i] + of["disha"][i % rank] for i in range(weight.shape[1])], 1)
        elif "start_A" in of:
            weight = weight - of["start_B"] @ of["start_A"] + of["lora_B"] @ of["lora_A"]
        else:
            weight = weight + alpha / rank * of["lora_B"] @ of["lora_A"]
        if "lora_M" in of:
            weight = (of["lora_M"] / weight.detach().norm(dim=1))[:, None] * weight
        weights[f"{name}.weight"] = weight
    return weights


def pair_numbers(weights: Weights, pair: tuple, flags: Mapping) -> Numbers:
    """What metrics.jsonl tells of one pair; "loss" is what trains, and the only one whose gradient counts."""
    prompt, chosen, reject, ref_c, ref_r = pair
    of_chosen, of_reject = (log_probs(weights, prompt + answer) for answer in (chosen, reject))
    c, r = of_chosen[len(prompt) - 1:].sum(), of_reject[len(prompt) - 1:].sum()
    n_c, n_r = len(chosen), len(reject)
    nll = -of_chosen.mean() if flags.get("sft_on_prompt") else -c / n_c
    name, e = flags.get("loss", "dpo"), flags.get("label_smoothing", 0.0)
    beta, alpha, rewards = flags.get("dpo_beta", 0.01), flags.get("dpo_alpha", 0.1), (c - ref_c, r - ref_r)

    def swapped(margin: Tensor) -> Tensor:
        return -(1 - e) * _log_sigmoid(margin) - e * _log_sigmoid(-margin)

    if name == "ipo":
        rewards = (c - ref_c) / n_c, (r - ref_r) / n_r
    elif name == "simpo":
        beta, alpha, rewards = flags.get("simpo_beta", 2.0), flags.get("simpo_alpha", 0.0), (c / n_c, r / n_r)
    elif name == "orpo":
        beta, alpha, rewards = flags.get("orpo_alpha", 0.1), 1.0, (c / n_c, r / n_r)
    elif name == "cpo":
        beta, alpha, rewards = flags.get("cpo_beta", 0.1), flags.get("cpo_alpha", 1.0), (c, r)
    h = rewards[0] - rewards[1]
    preference = {
        "dpo": lambda: swapped(beta * h),
        "robust": lambda: (-(1 - e) * _log_sigmoid(beta * h) + e * _log_sigmoid(-beta * h)) / (1 - 2 * e),
        "hinge": lambda: torch.relu(1 - beta * h),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "simpo": lambda: swapped(beta * h - flags.get("simpo_gamma", 1.0)),
        "orpo": lambda: -beta * _log_sigmoid(_log_odds(c / n_c) - _log_odds(r / n_r)),
        "cpo": lambda: swapped(beta * h),
    }[name]()
    return {"loss": preference + alpha * nll, "dpo_loss" if name == "dpo" else "preference_loss": preference, "sft_loss": nll,
            "reward_chosen": beta * rewards[0], "reward_rejected": beta * rewards[1], "margin": beta * h,
            "pref_accuracy": h > 0, "count": torch.tensor(1)}


def text_numbers(weights: Weights, text: tuple[list[int], list[bool]], _: Mapping) -> Numbers:
    """The same of a text with `--sft 1`: tokens, and which of them have a loss; the mean is over these, "count" of them."""
    tokens, trained = text
    total = -log_probs(weights, tokens)[torch.tensor(trained[1:])].sum()
    return {"loss": total, "sft_loss": total, "count": torch.tensor(sum(trained[1:]))}


def learning_rate(step: int, steps: int, warmup: int, first: float, last: float) -> float:
    """Of step 1 .. steps: a cosine from the first rate to the last, times a linear warm-up that does not begin at 0."""
    cosine = last + (first - last) * (1 + math.cos(math.pi * (step - 1) / max(steps - 1, 1))) / 2
    return cosine * min(1.0, step / (warmup + 1))


class PlainRun:
    """A run so far, on all of `examples` once a pass.

    Args:
        base: the checkpoint. trained: the adapter file's tensors before the first step, start_* among them.
        numbers: `pair_numbers` or `text_numbers`. flags: of train.py, without their dashes; its defaults where not given.
        rows: of the layer profile by layer ("0", "head", ...): Weight_lr_init and so on; what they lack comes from the flags.
    """

    def __init__(self, base: Weights, trained: Weights, examples: Sequence, numbers: Callable[..., Numbers], flags: Mapping,
                 rows: Mapping[str, Mapping[str, float]], total_steps: int):
        self.base = {name: tensor.double() for name, tensor in base.items()}
        self.trained = {name: tensor.double() for name, tensor in trained.items()}
        self.moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in self.trained.items()
                        if not name.rpartition(".")[2].startswith("start_")}
        self.examples, self.numbers, self.flags, self.rows, self.total_steps = examples, numbers, flags, rows, total_steps
        self.done, self.left, self.preferred = 0, list(range(len(examples))), 0.5

    def step(self, told: Mapping[str, float], sizes: Sequence[int]) -> dict[str, float]:
        """Make the next step, of as many examples as one of `sizes` says, and say what its line of metrics.jsonl should hold.

        The order within a pass is the run's own affair: of the examples that this pass has not seen, the step is taken to have
        had those whose means come nearest to what was `told` of it.
        """
        leaves = {name: self.trained[name].clone().requires_grad_() for name in self.moments}
        weights = adapted(self.base, self.trained | leaves, self.flags.get("lora_r", 16), self.flags.get("lora_alpha", 32.0))
        each = {at: self.numbers(weights, self.examples[at], self.flags) for at in self.left}
        choices = [some for size in sizes for some in combinations(self.left, size)]
        chosen = min(choices, key=lambda some: sum(
            abs(value - told[name]) for name, value in _mean([each[at] for at in some]).items()))
        some = [each[at] for at in chosen]
        self.left = [at for at in self.left if at not in chosen] or list(range(len(self.examples)))

        loss = sum(numbers["loss"] for numbers in some) / sum(numbers["count"] for numbers in some)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        expected = _mean(some) | {"grad_norm": norm, "lr": self._adamw(gradients, norm)}
        if "pref_accuracy" in expected:
            self.preferred = 0.9 * self.preferred + 0.1 * expected["pref_accuracy"]
            expected["pref_percentage"] = self.preferred
        return expected

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """What a line of eval.jsonl should hold of all examples, at the weights as they are."""
        weights = adapted(self.base, self.trained, self.flags.get("lora_r", 16), self.flags.get("lora_alpha", 32.0))
        means = _mean([self.numbers(weights, example, self.flags) for example in self.examples])
        return {"accuracy" if name == "pref_accuracy" else name: value for name, value in means.items()}

    def _adamw(self, gradients: dict[str, Tensor], norm: float) -> float:
        """arXiv:1711.05101, algorithm 2, on gradients clipped to a norm; returns the highest rate."""
        flag = self.flags.get
        beta1, beta2, eps, most = flag("beta1", 0.9), flag("beta2", 0.999), flag("adam_eps", 1e-8), flag("gradient_clip_val", 1.0)
        self.done += 1
        highest = 0.0
        for name, gradient in gradients.items():
            if most and norm > most:
                gradient = gradient * (most / norm)
            first, second = self.moments[name]
            first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
            self.moments[name] = first, second
            row = self.rows[name.split(".")[1] if name.startswith("blocks.") else "emb" if name.startswith("emb.") else "head"]
            kind = "State" if name.endswith("time_state") else "Weight"
            rates = (row.get(f"{kind}_lr_init", flag("lr_init", 1e-5)), row.get(f"{kind}_lr_final", flag("lr_final", 1e-6)))
            lr = learning_rate(self.done, self.total_steps, flag("warmup_steps", 0), *rates)
            decay = row["Weight_decay"] if MATRIX.search(name) else 0.0
            root = (second / (1 - beta2**self.done)).sqrt() + eps
            self.trained[name] = self.trained[name] - lr * (first / (1 - beta1**self.done) / root + decay * self.trained[name])
            highest = max(highest, lr)
        return highest


def _mean(numbers: Sequence[Numbers]) -> dict[str, float]:
    """Over pairs, or over the tokens that texts have."""
    count = sum(one["count"].item() for one in numbers)
    return {name: sum(float(one[name].detach()) for one in numbers) / count for name in numbers[0] if name != "count"}


def _log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def _log_odds(log_p: Tensor) -> Tensor:
    return log_p - torch.log(1 - torch.exp(log_p))
