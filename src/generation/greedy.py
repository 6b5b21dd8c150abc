"""A model's likeliest answers to a few prompts, as a run's report shows them before and after training."""

from collections.abc import Sequence

from src.data.templates import Ending
from src.generation.batch import MAX_TOKENS, generate
from src.generation.config import Sampling
from src.generation.requests import Request
from src.model import RWKV
from src.progress import plain_lines
from src.tokenizer import Tokenizer


def likeliest_answers(model: RWKV, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_tokens: int,
                      ending: Ending) -> list[tuple[str, bool]]:
    """Answer all prompts together, taking the likeliest token at each place; the model's training mode is left as it was.

    No random number is drawn, so this does not change a run that calls it.

    Args:
        prompts: tokens; an empty prompt is replaced by end-of-text, as in training.
        ending: what ends an answer.

    Returns:
        for each prompt the answer's text, and whether it is complete within `max_tokens`.

    Raises:
        NotFinite: the model's logits are not finite.
    """
    was_training = model.training
    model.eval()
    requests = [Request(row, tuple(tokens or [tokenizer.end_of_text])) for row, tokens in enumerate(prompts)]
    sampling = Sampling(temperature=0, frequency=0, max_tokens=max_tokens)
    advance = plain_lines("samples, tokens", len(prompts) * max_tokens)
    answers = sorted(generate(model, tokenizer, requests, sampling, seed=0, batch_size=len(prompts), on_tokens=advance,
                              ending=ending))
    model.train(was_training)
    return [(answer.text, answer.reason != MAX_TOKENS) for answer in answers]
