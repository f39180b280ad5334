"""A watermark that reading cannot see and counting can (Kirchenbauer et al. 2023, algorithm 2).

Each token seeds a split of the vocabulary. Tokens of the "green" part get DELTA more logit, so a watermarked text holds
more of them than the share GAMMA that chance gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

GAMMA = 0.5  # share of the vocabulary that is green
DELTA = 2.0  # nats
KEY = 15_485_863  # of the published implementation: anyone can test a text


def green_list(previous_id: int, vocab_size: int) -> Tensor:
    """Which tokens are green after `previous_id`, bool [V]."""
    generator = torch.Generator().manual_seed(KEY * (previous_id + 1))
    green = torch.zeros(vocab_size, dtype=torch.bool)
    green[torch.randperm(vocab_size, generator=generator)[: int(GAMMA * vocab_size)]] = True
    return green


def z_score(token_ids: Sequence[int], vocab_size: int) -> float:
    """Standard deviations by which green tokens exceed what chance gives; above 4, chance is one in 30,000."""
    n_tokens = len(token_ids) - 1
    if n_tokens < 1:
        return 0.0
    n_green = sum(bool(green_list(a, vocab_size)[b]) for a, b in itertools.pairwise(token_ids))
    return (n_green - GAMMA * n_tokens) / math.sqrt(n_tokens * GAMMA * (1 - GAMMA))
