"""Generation of one sequence, as plainly as it can be written: what every serving path must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from model.sampling import Sampler, Sampling
from model.transformer import AFTForCausalLM


@torch.inference_mode()
def generate(
    model: AFTForCausalLM, prompt_ids: Sequence[int], sampling: Sampling, max_new_tokens: int, end_of_text_id: int
) -> Iterator[int]:
    """Yield at most `max_new_tokens` ids that follow `prompt_ids`; the last one may be `end_of_text_id`."""
    sampler = Sampler(sampling)
    logits, state = model.prefill(torch.tensor([prompt_ids], device=model.device))
    for n_generated in range(1, max_new_tokens + 1):
        token_id = sampler.next_token(logits[0].cpu())
        yield token_id
        if token_id == end_of_text_id or n_generated == max_new_tokens:
            return
        logits, state = model.step(torch.tensor([token_id], device=model.device), state)
