"""The cached half of DPO: log-probabilities of every pair's answers under the base model, by the same code as in training."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from src.data.batching import batches_by_tokens
from src.data.packing import pack_pairs
from src.data.token_lists import EMPTY, TokenPair, TokenPairs
from src.errors import NotFinite
from src.model import RWKV
from src.preference.entries import is_log_prob
from src.preference.journal import Journal
from src.preference.kto import Mismatched
from src.preference.log_probs import answer_log_probs
from src.preference.stored import Pairs


@torch.no_grad()
def reference_log_probs(model: RWKV, pairs: TokenPairs, batch_tokens: int, advance: Callable[[int], None], source: str,
                        journal: Journal | None = None) -> np.ndarray:
    """[n, 2] float64: log ref(chosen | prompt) and log ref(reject | prompt) of each pair, in nats; 0 for an empty answer.

    Args:
        pairs: already cut to their final length. Equal pairs are computed once.
        batch_tokens: most tokens in one forward pass; a longer pair has a pass of its own.
        advance: called after each pass with the number of pairs done in it.
        source: names the model and its file in error messages, such as "the checkpoint x.pth".
        journal: has the batches that an interrupted run finished, and gets those of this run; None computes all.

    Raises:
        NotFinite: a log-probability is not finite, or impossible; the precision is too low for the model, or one of its files is
            bad.
    """
    model.eval()
    first, which = pairs.distinct()
    members = np.bincount(which)
    found = np.zeros((len(first), 2))
    batches = batches_by_tokens(pairs.sizes(), batch_tokens, first)
    done = journal.done if journal is not None else {}
    if journal is not None:
        journal.check([len(batch) for batch in batches])
    for number, batch in enumerate(batches):
        values = done.get(number)
        if values is None:
            values = _references(model, [pairs[at] for at in batch], source)
            if journal is not None:
                journal.append(number, values)
        found[which[batch]] = values
        advance(int(members[which[batch]].sum()))
    return found[which]


def to_score(pairs: TokenPairs, mismatched: Mismatched) -> TokenPairs:
    """All that gets references: the pairs, then each mismatched answer, as a chosen one, with its pair's prompt."""
    with_kl = np.flatnonzero(mismatched.kl != EMPTY)
    none = np.zeros(len(with_kl), np.int32)
    more = pairs.columns()[0][with_kl], mismatched.kl[with_kl], none + EMPTY, mismatched.kl_from[with_kl], none
    return TokenPairs(pairs.lists, *(np.concatenate(both) for both in zip(pairs.columns(), more, strict=True)))


def joined(pairs: TokenPairs, mismatched: Mismatched, references: np.ndarray) -> Pairs:
    """The pairs with their mismatched answers, and with the references [n, 2] of all that `to_score` gives."""
    of_kl = np.zeros(len(pairs))
    of_kl[mismatched.kl != EMPTY] = references[len(pairs):, 0]
    return Pairs(pairs, np.column_stack([references[:len(pairs)], of_kl]), mismatched.kl, mismatched.kl_from)


def _references(model: RWKV, pairs: Sequence[TokenPair], source: str) -> np.ndarray:
    """[n, 2] float64"""
    sums = answer_log_probs(model, pack_pairs(pairs).to(model.device)).answer
    if not torch.isfinite(sums).all():
        raise NotFinite(f"{source} gives log-probabilities that are not finite; replace it, or use bf16 or fp32 where --strategy "
                        "has fp16")
    values = sums.view(-1, 2).double().cpu().numpy()
    if len(unlikely := values[~is_log_prob(values)]):
        raise NotFinite(f"{source} gives an answer the impossible log-probability {unlikely[0]:g}; replace it")
    return values
