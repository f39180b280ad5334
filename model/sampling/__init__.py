"""Choosing tokens: what may be asked (`params`), what one text remembers (`adjust`), how a batch chooses (`choose`)."""

from model.sampling.adjust import Step, Vocabulary
from model.sampling.choose import Sampler, sample
from model.sampling.params import GREEDY, LARGEST, SEED_BITS, Grammar, SamplingError, SamplingParams

__all__ = [
    "GREEDY",
    "LARGEST",
    "SEED_BITS",
    "Grammar",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "Step",
    "Vocabulary",
    "sample",
]
