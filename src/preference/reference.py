"""The cached half of DPO: log-probabilities of every pair's answers under the base model, by the same code as in training."""

from collections.abc import Callable, Sequence
from itertools import repeat

import torch

from src.data.batching import batches_by_tokens
from src.data.packing import pack_pairs
from src.data.tokenize import TokenPair
from src.errors import NotFinite
from src.model import RWKV
from src.preference.journal import Journal
from src.preference.log_probs import answer_log_probs
from src.preference.pairs import Pair, is_log_prob


@torch.no_grad()
def with_references(model: RWKV, pairs: Sequence[TokenPair], batch_tokens: int, advance: Callable[[int], None], source: str,
                    journal: Journal | None = None, kl: Sequence[list[int]] = ()) -> list[Pair]:
    """Add log ref(chosen | prompt) and log ref(reject | prompt), in nats, to each pair, in the same order; 0 for an empty answer.

    Args:
        pairs: already cut to their final length. Equal pairs are computed once.
        batch_tokens: most tokens in one forward pass; a longer pair has a pass of its own.
        advance: called after each pass with the number of pairs done in it, of those that `to_score` gives.
        source: names the model and its file in error messages, such as "the checkpoint x.pth".
        journal: has the batches that an interrupted run finished, and gets those of this run; None computes all.
        kl: for each pair a mismatched completion, empty for none, which gets a reference too, given the pair's prompt.

    Raises:
        NotFinite: a log-probability is not finite, or impossible; the precision is too low for the model, or one of its files is
            bad.
    """
    model.eval()
    wanted = to_score(pairs, kl)
    members: dict[tuple, list[int]] = {}
    for index, pair in enumerate(wanted):
        members.setdefault((*map(tuple, pair[:3]), pair.chosen_from, pair.reject_from), []).append(index)
    groups = list(members.values())
    found: dict[int, list[float]] = {}
    batches = list(batches_by_tokens([wanted[group[0]] for group in groups], batch_tokens))
    done = journal.done if journal is not None else {}
    if journal is not None:
        journal.check([len(batch) for batch in batches])
    for number, batch in enumerate(batches):
        values = done.get(number)
        if values is None:
            values = _references(model, [wanted[groups[at][0]] for at in batch], source)
            if journal is not None:
                journal.append(number, values)
        for at, both in zip(batch, values, strict=True):
            found |= dict.fromkeys(groups[at], both)
        advance(sum(len(groups[at]) for at in batch))
    of_kl = (found[index][0] for index in range(len(pairs), len(wanted)))
    return [join(pair, found[index], completion, next(of_kl) if completion else 0.0)
            for index, (pair, completion) in enumerate(zip(pairs, kl or repeat([]), strict=False))]


def to_score(pairs: Sequence[TokenPair], kl: Sequence[list[int]] = ()) -> list[TokenPair]:
    """All that gets references: the pairs, then each mismatched completion with its pair's prompt."""
    return [*pairs, *(TokenPair(pair.prompt, completion, []) for pair, completion in zip(pairs, kl, strict=False) if completion)]


def join(pair: TokenPair, references: Sequence[float], kl: list[int], kl_base_prob: float) -> Pair:
    """The pair with its two references, and where there is one, its mismatched completion with that's."""
    chosen, reject = references
    return Pair(pair.prompt, pair.chosen, pair.reject, chosen, reject, pair.chosen_from, pair.reject_from, kl or (), kl_base_prob)


def _references(model: RWKV, pairs: Sequence[TokenPair], source: str) -> list[list[float]]:
    sums = answer_log_probs(model, pack_pairs(pairs).to(model.device)).answer
    if not torch.isfinite(sums).all():
        raise NotFinite(f"{source} gives log-probabilities that are not finite; replace it, or use bf16 or fp32 where --strategy "
                        "has fp16")
    values = sums.view(-1, 2).tolist()
    unlikely = [value for pair in values for value in pair if not is_log_prob(value)]
    if unlikely:
        raise NotFinite(f"{source} gives an answer the impossible log-probability {unlikely[0]:g}; replace it")
    return values
