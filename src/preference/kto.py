"""What KTO (Ethayarajh et al. 2024, arXiv:2402.01306) needs besides its loss: thumbs, mismatched answers, their KL, the balance.

Its examples are thumbs: prompts with one answer, up (desirable, a chosen answer) or down (undesirable, a reject).
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from src.data.packing import PackedBatch, pack_pairs
from src.data.tokenize import TokenPair
from src.model import RWKV
from src.preference.log_probs import answer_log_probs
from src.preference.pairs import Pair

# Where (weight of thumbs up * their number) / (weight of thumbs down * their number) should be (equation 8 there), and what is
# suggested where it is not.
LOWEST_BALANCE, HIGHEST_BALANCE, MIDDLE_BALANCE = 1.0, 4 / 3, 7 / 6


def is_thumb(pair: TokenPair | Pair) -> bool:
    """Whether exactly one of the answers is there."""
    return bool(pair.chosen) != bool(pair.reject)


def unpaired(pair: TokenPair) -> list[TokenPair]:
    """A pair as a thumb up and a thumb down; a thumb as it is."""
    if is_thumb(pair):
        return [pair]
    return [pair._replace(reject=[], reject_from=0), pair._replace(chosen=[], chosen_from=0)]


def mismatched_answers(pairs: Sequence[TokenPair], prompts: Sequence[Hashable], seed: int, max_len: int) -> list[list[int]]:
    """For each thumb the answer of a thumb of another prompt, as `mismatch` says; for any other pair an empty list.

    With its new prompt, which stays as it is, it has at most `max_len` tokens, or loses its end.

    Args:
        prompts: of each pair, whatever is equal for equal prompts.

    Raises ValueError if all thumbs are of one prompt.
    """
    answers: list[list[int]] = [[] for _ in pairs]
    thumbs = [at for at, pair in enumerate(pairs) if is_thumb(pair)]
    for at, other in zip(thumbs, mismatch([prompts[at] for at in thumbs], seed), strict=True):
        answer, room = pairs[thumbs[other]].chosen or pairs[thumbs[other]].reject, max_len - len(pairs[at].prompt)
        answers[at] = answer if len(answer) <= room else answer[:room]
    return answers


def mismatch(prompts: Sequence[Hashable], seed: int) -> list[int]:
    """For each example the number of another one, of another prompt, whose answer it is to be seen with.

    The examples are put in a seeded order, those of one prompt together, and each takes the answer of the one that is as many
    places further on, around the end, as the most frequent prompt has examples. So every answer is taken once, and never for its
    own prompt. If a prompt has more than half of all examples, that can't be: its examples then take the others' answers in turn,
    repeatedly, and the others take its.

    Raises ValueError if there is only one prompt.
    """
    # A sequence of numbers of its own: the seed alone draws templates.
    generator = np.random.default_rng([seed, len(prompts)])
    members: dict[Hashable, list[int]] = {}
    for example in generator.permutation(len(prompts)).tolist():
        members.setdefault(prompts[example], []).append(example)
    if len(members) == 1:
        raise ValueError("there is only one prompt")
    order = [example for group in members.values() for example in group]
    most = max(members.values(), key=len, default=[])
    if 2 * len(most) <= len(order):
        taken = {example: order[(place + len(most)) % len(order)] for place, example in enumerate(order)}
    else:
        others = [example for example in order if prompts[example] != prompts[most[0]]]
        taken = {example: theirs[place % len(theirs)] for ours, theirs in ((most, others), (others, most))
                 for place, example in enumerate(ours)}
    return [taken[example] for example in range(len(prompts))]


def pack_mismatched(thumbs: Sequence[Pair]) -> tuple[PackedBatch, Tensor]:
    """The thumbs' prompts with their mismatched answers, packed as chosen ones, and the references of these, float64 [B]."""
    packed = pack_pairs([TokenPair(thumb.prompt, list(thumb.kl), []) for thumb in thumbs])
    return packed, torch.tensor([thumb.kl_base_prob for thumb in thumbs], dtype=torch.float64)


@torch.no_grad()
def kl_part(model: RWKV, packed: PackedBatch, references: Tensor, share: float) -> Tensor:
    """share * the sum of log pi(y' | x) - log ref(y' | x) over mismatched answers y', in nats, float64 [], without dropout.

    With `share` 1 over the number of all thumbs, the parts of all micro-batches add up to a mean.
    """
    was_training = model.training
    model.eval()
    answers = answer_log_probs(model, packed).answer.view(-1, 2)[:, 0]
    model.train(was_training)
    return share * (answers.double() - references).sum()


def kl_estimate(mean: Tensor) -> Tensor:
    """The estimated KL of the policy from the reference, in nats: the mean log-ratio of mismatched answers, but at least 0."""
    return mean.clamp(min=0.0)


def by_kind(means: dict[str, float]) -> dict[str, float]:
    """Means over all thumbs as means over those that a number belongs to; a number that belongs to none is left out.

    `means` has the shares of thumbs "desirable" and "undesirable", which go, and rewards and "sft_loss" with zeros in thumbs of
    the other kind. Its margin becomes the difference of the two rewards, in place of the distance from the KL.
    """
    found = {name: mean for name, mean in means.items() if name not in ("desirable", "undesirable", "margin")}
    for kind, names in (("desirable", ("reward_chosen", "sft_loss")), ("undesirable", ("reward_rejected",))):
        for name in names:
            if means[kind]:
                found[name] = means[name] / means[kind]
            else:
                del found[name]
    if "reward_chosen" in found and "reward_rejected" in found:
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    return found


def balance(up: int, down: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """The counts, what is wrong with them under these weights, and the weight to use; None if they are balanced."""
    counts = f"{up} thumbs up and {down} down"
    if not up or not down:
        return f"{counts}, so the run only learns what {'not ' if not up else ''}to do; KTO needs both kinds"
    ratio = desirable_weight * up / (undesirable_weight * down)
    if LOWEST_BALANCE <= ratio <= HIGHEST_BALANCE:
        return None
    if ratio < LOWEST_BALANCE:
        better = f"--kto_desirable_weight {MIDDLE_BALANCE * undesirable_weight * down / up:.3g}"
    else:
        better = f"--kto_undesirable_weight {desirable_weight * up / down / MIDDLE_BALANCE:.3g}"
    return f"{counts}, weighted {ratio:.3g}:1, where KTO asks for 1:1 to 4:3 (arXiv:2402.01306, section 4.2); take {better}"
