"""What KTO (Ethayarajh et al. 2024, arXiv:2402.01306) needs besides its loss: thumbs, mismatched answers, their KL, the balance.

Its examples are thumbs: prompts with one answer, up (desirable, a chosen answer) or down (undesirable, a reject).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.data.packing import PackedBatch, pack_pairs
from src.data.token_lists import EMPTY, TokenPair, TokenPairs
from src.model import RWKV
from src.preference.entries import Pair
from src.preference.log_probs import answer_log_probs

# Where (weight of thumbs up * their number) / (weight of thumbs down * their number) should be (equation 8 there), and what is
# suggested where it is not.
LOWEST_BALANCE, HIGHEST_BALANCE, MIDDLE_BALANCE = 1.0, 4 / 3, 7 / 6


def are_thumbs(pairs: TokenPairs) -> np.ndarray:
    """[n] bool: whether exactly one of the answers is there."""
    _, chosen, reject = pairs.lengths()
    return (chosen > 0) != (reject > 0)


def unpaired(pairs: TokenPairs) -> tuple[TokenPairs, np.ndarray]:
    """Each pair as a thumb up and a thumb down, a thumb as it is; and for each of them the place of its pair."""
    alone = are_thumbs(pairs)
    of = np.repeat(np.arange(len(pairs)), np.where(alone, 1, 2))
    is_second = np.diff(of, prepend=-1) == 0
    prompt, chosen, reject, chosen_from, reject_from = (column[of] for column in pairs.columns())
    for column in (chosen, chosen_from):
        column[is_second] = EMPTY
    for column in (reject, reject_from):
        column[~is_second & ~alone[of]] = EMPTY
    return TokenPairs(pairs.lists, prompt, chosen, reject, chosen_from, reject_from), of


class Mismatched(NamedTuple):
    """Of each pair the number of its mismatched answer among the lists of tokens, EMPTY for none, and where its loss begins."""

    kl: np.ndarray  # [n] int32
    kl_from: np.ndarray  # [n] int32


def mismatched_answers(pairs: TokenPairs, prompts: np.ndarray, seed: int, max_len: int) -> Mismatched:
    """For each thumb the answer of a thumb of another prompt, as `mismatch` says; none for any other pair.

    With its new prompt, which stays as it is, it has at most `max_len` tokens, or loses its end. A shortened copy is added to the
    lists of `pairs`.

    Args:
        prompts: [n] whole numbers that are equal for equal prompts.

    Raises ValueError if all thumbs are of one prompt.
    """
    found = Mismatched(np.full(len(pairs), EMPTY, np.int32), np.zeros(len(pairs), np.int32))
    thumbs = np.flatnonzero(are_thumbs(pairs))
    others = thumbs[mismatch(prompts[thumbs], seed)]
    prompt, chosen, reject, chosen_from, reject_from = pairs.columns()
    lengths = pairs.lists.lengths()
    found.kl[thumbs] = np.where(chosen == EMPTY, reject, chosen)[others]
    found.kl_from[thumbs] = np.where(chosen == EMPTY, reject_from, chosen_from)[others]
    room = max_len - lengths[prompt]
    shortened: dict[tuple[int, int], int] = {}
    for at in np.flatnonzero(lengths[found.kl] > room).tolist():
        answer = int(found.kl[at]), int(room[at])
        if answer not in shortened:
            shortened[answer] = pairs.lists.append(pairs.lists[answer[0]][:answer[1]])
        found.kl[at] = shortened[answer]
        # What is left of a long thinking part alone still has a loss: its last token.
        found.kl_from[at] = min(found.kl_from[at], room[at] - 1)
    return found


def mismatch(prompts: np.ndarray, seed: int) -> np.ndarray:
    """For each example the number of another one, of another prompt, whose answer it is to be seen with.

    The examples are put in a seeded order, those of one prompt together, and each takes the answer of the one that is as many
    places further on, around the end, as the most frequent prompt has examples. So every answer is taken once, and never for its
    own prompt. If a prompt has more than half of all examples, that can't be: its examples then take the others' answers in turn,
    repeatedly, and the others take its.

    Args:
        prompts: [n] whole numbers that are equal for equal prompts.

    Returns:
        [n] int64.

    Raises ValueError if there is only one prompt.
    """
    if not len(prompts):
        return np.zeros(0, np.int64)
    # A sequence of numbers of its own: the seed alone draws templates.
    drawn = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))
    _, first, which, counts = np.unique(prompts[drawn], return_index=True, return_inverse=True, return_counts=True)
    if len(first) == 1:
        raise ValueError("there is only one prompt")
    # Prompts are in the order of their first example.
    order = drawn[np.argsort(first[which], kind="stable")]
    most = counts.max()
    taken = np.empty(len(prompts), np.int64)
    if 2 * most <= len(order):
        taken[order] = np.roll(order, -most)
        return taken
    is_most = prompts[order] == prompts[drawn[first[counts.argmax()]]]
    ours, theirs = order[is_most], order[~is_most]
    taken[ours], taken[theirs] = np.resize(theirs, len(ours)), ours[:len(theirs)]
    return taken


def pack_mismatched(thumbs: Sequence[Pair]) -> tuple[PackedBatch, Tensor]:
    """The thumbs' prompts with their mismatched answers, packed as chosen ones, and the references of these, float64 [B]."""
    packed = pack_pairs([TokenPair(thumb.prompt, list(thumb.kl), [], thumb.kl_from) for thumb in thumbs])
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
