"""Generation of one sequence, as plainly as it can be written: what every serving path must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from model.language_model import LanguageModel
from model.sampling import Sampler, SamplingParams, Vocabulary, sample


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt_ids: Sequence[int], params: SamplingParams, vocabulary: Vocabulary
) -> Iterator[int]:
    """Yield at most `params.max_tokens` ids that follow `prompt_ids`; the last one may be a token that ends the text.

    Stop strings, grammars and several texts are the engine's.
    """
    sampler = Sampler(params, prompt_ids, vocabulary)
    logits, state = model.prefill(torch.tensor([prompt_ids], device=model.device))
    for n_generated in range(1, params.max_tokens + 1):
        (token_id,) = sample(logits.cpu(), [sampler])
        if isinstance(token_id, Exception):
            raise token_id
        yield token_id
        if token_id in sampler.end_ids or n_generated == params.max_tokens:
            return
        logits, state = model.step(torch.tensor([token_id], device=model.device), state)
