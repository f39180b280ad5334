"""Generation of one sequence, as plainly as it can be written: what every serving path must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from model.language_model import LanguageModel
from model.sampling import Sampler, SamplingError, SamplingParams, sample


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt_ids: Sequence[int], params: SamplingParams, end_of_text_id: int
) -> Iterator[int]:
    """Yield at most `params.max_tokens` ids that follow `prompt_ids`; the last one may be a token that ends the text.

    Knows tokens only: stop strings, grammars and several texts are the engine's.
    """
    sampler = Sampler(params, prompt_ids, model.config.vocab_size, end_of_text_id)
    logits, state = model.prefill(torch.tensor([prompt_ids], device=model.device))
    for n_generated in range(1, params.max_tokens + 1):
        (token_id,) = sample(logits.cpu(), [sampler])
        if isinstance(token_id, SamplingError):
            raise token_id
        yield token_id
        if token_id in sampler.end_ids or n_generated == params.max_tokens:
            return
        logits, state = model.step(torch.tensor([token_id], device=model.device), state)
