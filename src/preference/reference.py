"""The cached half of DPO: log-probabilities of every pair's answers under the base model, by the training model's own code."""

from collections.abc import Callable, Sequence

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
                    journal: Journal | None = None) -> list[Pair]:
    """Append log ref(chosen | prompt) and log ref(reject | prompt), in nats, to each pair; the order stays.

    Args:
        pairs: (prompt, chosen, reject) tokens, already cut to their final length. Equal pairs are computed once.
        batch_tokens: most tokens in one forward pass; a longer pair goes alone.
        advance: told how many pairs are done after each pass.
        source: what the model is and its file, for the message of an error, such as "the checkpoint x.pth".
        journal: has what an interrupted run finished, and gets what this one does; without it all is computed.

    Raises:
        NotFinite: a log-probability that is not finite, or that no answer can have; the precision is too low for the model, or
            one of its files is bad.
    """
    model.eval()
    members: dict[tuple, list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(tuple(map(tuple, pair)), []).append(index)
    groups = list(members.values())
    found: dict[int, Pair] = {}
    batches = list(batches_by_tokens([pairs[group[0]] for group in groups], batch_tokens))
    done = journal.done if journal is not None else {}
    if journal is not None:
        journal.check([len(batch) for batch in batches])
    for number, batch in enumerate(batches):
        values = done.get(number)
        if values is None:
            values = _references(model, [pairs[groups[at][0]] for at in batch], source)
            if journal is not None:
                journal.append(number, values)
        for at, (chosen, reject) in zip(batch, values, strict=True):
            for index in groups[at]:
                found[index] = (*pairs[index], chosen, reject)
        advance(sum(len(groups[at]) for at in batch))
    return [found[index] for index in range(len(pairs))]


def _references(model: RWKV, pairs: Sequence[TokenPair], source: str) -> list[list[float]]:
    sums = answer_log_probs(model, pack_pairs(pairs).to(model.device)).answer
    if not torch.isfinite(sums).all():
        raise NotFinite(f"{source} gives log-probabilities that are not finite; replace it, or use bf16 or fp32 where --strategy "
                        "has fp16")
    values = sums.view(-1, 2).tolist()
    unlikely = [value for pair in values for value in pair if not is_log_prob(value)]
    if unlikely:
        raise NotFinite(f"{source} gives an answer the log-probability {unlikely[0]:g}, as no sound model does; replace it")
    return values
