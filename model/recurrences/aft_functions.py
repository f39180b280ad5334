"""The AFT operation (Zhai et al. 2021, equation 2, causal), as pure functions.

    y_t = sum_{t' <= t} exp(k_t' + w_{t,t'}) v_t'  /  sum_{t' <= t} exp(k_t' + w_{t,t'})

Every variant has w = 0 outside a window, so one recurrence serves all: tokens inside the window keep their own key
and value, in a ring; a token that leaves it is added to running sums (`absorb`). Only positive weights are ever
summed, each relative to a maximum, so no finite key can overflow and none can turn a row into 0 / 0.

RWKV-4 (Peng et al. 2023, equation 16) is the same without a window, w_{t,t'} = -(t - 1 - t') decay and a bonus for the
token itself: the sums lose `decay` nats with every token.

Shapes: B sequences, T tokens, H keys per token, D features per key, Q queries, K keys seen by them (K >= Q; the
queries are the last Q of the K tokens), W = window - 1.
    keys [B, K, H]    values [B, K, H, D]    bias [B or 1, H or 1, Q, K], -inf where the key is later than the query
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.recurrences.limits import EMPTY_REFERENCE, LARGEST_KEY, LOW_SUM, REFERENCE_SLACK

BLOCK = 64  # tokens per block of the parallel form: its work per token grows with BLOCK + window
DECAY_BLOCK = 32  # the same where sums decay, which costs an exponential for every pair and key
SLOW_DECAY = 0.5  # nats; below, sums last so long that exp(-decay), rounded, would be the factor of another decay
LARGEST_DECAY = 1e28  # nats per token; more cannot matter, and would overflow
SAFE_DENOMINATOR = 1e-12  # below this the factorised form may have lost terms that matter to underflow
DIRECT_ELEMENTS = 2**24  # most weights that the direct form holds at a time when it stands in for the factorised one

ROUNDED = 1e-3  # of a sum: far more than rounding can add to it

EMPTY_KEY = float("-inf")  # exp(EMPTY_KEY + bias) is 0: a slot of the window that no token has filled yet

BiasFunction = Callable[[int, int, int], Tensor]  # (n_queries, n_keys, tokens of this call before the first query)


class Sums(NamedTuple):
    """Sums over every token that has left the window, where its bias is 0 for ever, or falls with every token.

    The value of a token is extended by a constant 1, so one tensor holds both sums of the paper's formula:
    numerator sum exp(k - reference) v in [..., :D], denominator sum exp(k - reference) in [..., D].

    reference    [B, H]      in nats; follows the largest key, see `absorb`
    sums         [B, H, D+1]
    compensation [B, H, D+1] what rounding has taken from `sums` so far (Neumaier), to be added back on reading
    """

    reference: Tensor
    sums: Tensor
    compensation: Tensor

    @staticmethod
    def empty(batch_size: int, n_key: int, d_key: int, device: torch.device) -> Sums:
        zeros = torch.zeros(batch_size, n_key, d_key + 1, device=device)
        return Sums(torch.full((batch_size, n_key), EMPTY_REFERENCE, device=device), zeros, zeros.clone())


class Window(NamedTuple):
    """The tokens that still have a bias, in a ring, so that a token is written once: position t is in slot t mod W.

    keys   [B, W, H]
    values [B, W, H, D]
    """

    keys: Tensor
    values: Tensor

    @staticmethod
    def empty(batch_size: int, n_key: int, d_key: int, n_window: int, device: torch.device) -> Window:
        keys = torch.full((batch_size, n_window, n_key), EMPTY_KEY, device=device)
        return Window(keys, torch.zeros(batch_size, n_window, n_key, d_key, device=device))


def forward(
    keys: Tensor,
    values: Tensor,
    bias: BiasFunction,
    n_window: int,
    position: Tensor,
    running: Sums,
    window: Window | None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Sums, Window]:
    """Parallel form over T tokens that follow a state: averages y [B, T, H, D] and the state after them.

    The tokens are taken in blocks that hand a state on, so the cost is linear in T, and cutting the input anywhere
    gives the same function. keys [B, T, H], values [B, T, H, D]; n_window = W; position [B or 1] of the first token;
    window: None if no token is in it; decay [H] in nats per token, of the running sums, for W = 0; the bias has that of
    the tokens.
    """
    n_tokens = keys.shape[1]
    keys, values = _bounded(keys), values.float()
    if window is None:  # no columns here: nothing is computed for tokens that do not exist
        window = Window.empty(keys.shape[0], keys.shape[2], values.shape[3], 0, keys.device)
    else:
        window = _roll(window, position)
    outputs = []
    block = BLOCK if decay is None else DECAY_BLOCK
    for start in range(0, n_tokens, block):
        block_keys = torch.cat([window.keys, keys[:, start : start + block]], 1)
        block_values = torch.cat([window.values, values[:, start : start + block]], 1)
        n_queries = min(block, n_tokens - start)
        block_bias = bias(n_queries, block_keys.shape[1], start)
        outputs.append(average(block_keys, block_values, block_bias, running, decay))
        running, window = slide(running, block_keys, block_values, n_window, decay)
    missing = n_window - window.keys.shape[1]
    if missing > 0:
        padded_keys = F.pad(window.keys, (0, 0, missing, 0), value=EMPTY_KEY)
        window = Window(padded_keys, F.pad(window.values, (0, 0, 0, 0, missing, 0)))
    return torch.cat(outputs, 1), running, _roll(window, -(position + n_tokens))


def step_(
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    position: Tensor,
    running: Sums,
    window: Window | None,
    decay: Tensor | None = None,
) -> Tensor:
    """Recurrent form for one token: averages y [B, H, D]; sums and window become those after it.

    key [B, H], value [B, H, D], position [B], bias [B or 1, W+1, H or 1] by the distance to the token, decay [H].
    """
    key, value = _bounded(key), value.float()
    bias = bias.expand(len(key), -1, -1)
    keys, values, own_bias = key.unsqueeze(1), value.unsqueeze(1), bias[:, :1]
    if window is not None:
        n_window = window.keys.shape[1]
        distance = (position.unsqueeze(1) - 1 - torch.arange(n_window, device=key.device)) % n_window + 1  # [B, W]
        index = distance.unsqueeze(-1).expand(-1, -1, bias.shape[2])
        keys, values = torch.cat([window.keys, keys], 1), torch.cat([window.values, values], 1)
        own_bias = torch.cat([bias.gather(1, index), own_bias], 1)
    top = torch.maximum(keys.amax(1), running.reference)  # [B, H]
    logits = (keys - top.unsqueeze(1)) + own_bias
    carried_logit = running.reference - top
    peak = torch.maximum(logits.amax(1), carried_logit)
    weights = torch.exp(logits - peak.unsqueeze(1))  # [B, W+1, H]
    carried = torch.exp(carried_logit - peak).unsqueeze(-1) * _total(running)
    numerator = (weights.unsqueeze(-1) * values).sum(1) + carried[..., :-1]
    denominator = weights.sum(1) + carried[..., -1]
    _replace_oldest_(key, value, position, running, window, decay)
    return numerator / denominator.unsqueeze(-1)


def _replace_oldest_(
    key: Tensor, value: Tensor, position: Tensor, running: Sums, window: Window | None, decay: Tensor | None
) -> None:
    """The token takes the slot of the one that leaves the window, which goes into the running sums."""
    leaving_key, leaving_value = key, value
    if window is not None:
        rows, slot = torch.arange(len(key), device=key.device), position % window.keys.shape[1]
        leaving_key, leaving_value = window.keys[rows, slot], window.values[rows, slot]
        window.keys[rows, slot], window.values[rows, slot] = key, value
    after = absorb(running, leaving_key.unsqueeze(1), leaving_value.unsqueeze(1), decay)
    for old, new in zip(running, after, strict=True):
        old.copy_(new)


def average(keys: Tensor, values: Tensor, bias: Tensor, running: Sums, decay: Tensor | None = None) -> Tensor:
    """y [B, Q, H, D] for the last Q of K tokens, by whichever form is fast and exact here.

    The direct form costs an exponential per (query, key, H); the factorised one needs a bias common to all H, and
    is much cheaper when there is a key per feature. It says itself whether it was exact.
    """
    if bias.shape[1] == 1 and values.shape[3] == 1 and decay is None:
        output, denominator = average_factorised(keys, values, bias[:, 0], running)
        if bool((denominator > SAFE_DENOMINATOR).all()):
            return output
        return _average_direct_by_rows(keys, values, bias, running)
    return average_direct(keys, values, bias, running, decay)


def average_direct(keys: Tensor, values: Tensor, bias: Tensor, running: Sums, decay: Tensor | None = None) -> Tensor:
    """Each row against its own maximum: exact for any keys and any bias. Returns y [B, Q, H, D]."""
    # A key is taken relative to the largest that its row sees, then the bias is added: k + w alone would round to
    # 1e-5 at |k| = 200, and so would the difference to a key that jumps up later.
    seen = keys.cummax(1).values[:, -bias.shape[2] :]  # [B, Q, H]
    top = torch.maximum(seen, running.reference.unsqueeze(1)).detach().transpose(1, 2)  # [B, H, Q]
    logits = (keys.transpose(1, 2).unsqueeze(2) - top.unsqueeze(-1)) + bias  # [B, H, Q, K]
    carried_logit = running.reference.unsqueeze(-1) - top  # [B, H, Q]
    if decay is not None:
        carried_logit = carried_logit - decay.unsqueeze(-1) * torch.arange(bias.shape[2], device=decay.device)
    peak = torch.maximum(logits.amax(-1), carried_logit).detach()
    weights = torch.exp(logits - peak.unsqueeze(-1))
    carried = torch.exp(carried_logit - peak).unsqueeze(-1) * _total(running).unsqueeze(2)  # [B, H, Q, D+1]
    numerator = weights @ values.transpose(1, 2) + carried[..., :-1]
    denominator = weights.sum(-1) + carried[..., -1]
    return (numerator / denominator.unsqueeze(-1)).transpose(1, 2)


def _average_direct_by_rows(keys: Tensor, values: Tensor, bias: Tensor, running: Sums) -> Tensor:
    """`average_direct` for a key per feature: some rows at a time, to bound the memory."""
    n_queries, n_keys = bias.shape[2:]
    n_rows = max(1, DIRECT_ELEMENTS // keys.numel())
    outputs = []
    for start in range(0, n_queries, n_rows):
        end = min(start + n_rows, n_queries)
        seen = n_keys - n_queries + end
        rows = bias[:, :, start:end, :seen]
        outputs.append(average_direct(keys[:, :seen], values[:, :seen], rows, running))
    return torch.cat(outputs, 1)


def average_factorised(keys: Tensor, values: Tensor, bias: Tensor, running: Sums) -> tuple[Tensor, Tensor]:
    """exp(k + w) = exp(k) exp(w): one matrix product for all features. D = 1, bias [B or 1, Q, K].

    Returns y [B, Q, H, 1] and the denominators [B, Q, H] relative to the largest key of the block and the largest
    bias of the row. Terms are positive, so a row is exact unless its denominator is so small that terms of its
    size may have underflowed.
    """
    top = torch.maximum(keys.amax(1), running.reference).detach().unsqueeze(1)  # [B, 1, H]
    peak = bias.amax(-1, keepdim=True).clamp(min=0.0).detach()  # [B or 1, Q, 1]
    weights = torch.exp(keys - top)  # [B, K, H]
    pairs = torch.exp(bias - peak) @ torch.cat([weights * values.squeeze(-1), weights], -1)
    carried = torch.exp(running.reference.unsqueeze(1) - top - peak).unsqueeze(-1) * _total(running).unsqueeze(1)
    numerator, denominator = pairs.chunk(2, -1)
    numerator, denominator = numerator + carried[..., 0], denominator + carried[..., 1]
    return (numerator / denominator).unsqueeze(-1), denominator


def slide(running: Sums, keys: Tensor, values: Tensor, n_window: int, decay: Tensor | None) -> tuple[Sums, Window]:
    """Keep the last W of K tokens as the window; the others have left it and go into the running sums."""
    n_leaving = max(keys.shape[1] - n_window, 0)
    if n_leaving:
        running = absorb(running, keys[:, :n_leaving], values[:, :n_leaving], decay)
    return running, Window(keys[:, n_leaving:], values[:, n_leaving:])


def absorb(running: Sums, keys: Tensor, values: Tensor, decay: Tensor | None = None) -> Sums:
    """Add tokens keys [B, N, H], values [B, N, H, D] to the running sums, with bias 0, or less by decay [H] per token.

    Two errors could grow with the length of a sequence. Adding a small term to a large sum loses its low bits: the
    loss is kept in `compensation`. Rescaling at each new maximum rounds: so the reference moves only when a key
    exceeds it by 16 nats, at most once for each 16 nats that the largest key rises, and the rounding of so few moves
    does not add up. For sums that decay see `_decayed`.
    """
    before, faded = running.reference, None
    if decay is not None:
        age = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
        faded = decay * age.unsqueeze(1)  # [N, H]
        before = _sunk(running, keys.shape[1] * decay.detach())
    top = (keys if faded is None else keys - faded).amax(1).detach()
    reference = torch.where(top > before + REFERENCE_SLACK, top, before)
    logits = keys - reference.unsqueeze(1)
    weights = torch.exp(logits if faded is None else logits - faded)  # [B, N, H]
    added = torch.cat([(weights.unsqueeze(-1) * values).sum(1), weights.sum(1).unsqueeze(-1)], -1)
    if decay is None:
        scale = torch.exp(running.reference - reference).unsqueeze(-1)
        compensation = running.compensation * scale
    else:
        scale, change = _decayed(running.reference, reference, keys.shape[1] * decay)
        added = added + running.sums * change
        compensation = running.compensation * (scale + change)
    sums = running.sums * scale
    total = sums + added
    rounded = total - sums  # the part of `added` that arrived (Knuth's two-sum)
    lost = (sums - (total - rounded)) + (added - rounded)
    return Sums(reference, total, compensation + lost)


def is_possible(running: Sums, window: Window | None, position: int) -> bool:
    """Whether `position` tokens of one sequence, B = 1, can have left this.

    Slots of the window that no token has filled are empty, the others hold finite numbers. No term of the sums is over
    exp(REFERENCE_SLACK) beside the reference, and none is negative, which bounds the denominator by the number of
    tokens in it; where that is 0, so is the numerator, and elsewhere their ratio, a mean of values, is finite.
    """
    if not all(bool(part.isfinite().all()) for part in running):
        return False
    n_absorbed = position
    if window is not None:
        n_window = window.keys.shape[1]
        n_absorbed = max(position - n_window, 0)
        is_filled = torch.arange(n_window, device=window.keys.device) < position
        is_right = torch.where(is_filled.unsqueeze(-1), window.keys.isfinite(), window.keys == EMPTY_KEY)
        if not bool(is_right.all() and window.values.isfinite().all()):
            return False
    total = _total(running)
    numerator, denominator = total[..., :-1], total[..., -1:]
    most = n_absorbed * math.exp(REFERENCE_SLACK) * (1 + ROUNDED)
    is_mean = torch.where(denominator > 0, (numerator / denominator).isfinite(), numerator == 0)
    return bool(((denominator >= 0) & (denominator <= most) & is_mean).all())


def _sunk(running: Sums, faded: Tensor) -> Tensor:
    """The reference [B, H] of sums that lose `faded` [H] nats: lower, if they would be too low beside it.

    It sinks by multiples of the slack, which no reference is rounded by. If it sank with the sums, each token would
    round the decay to the digits that the reference has left.
    """
    is_low = running.sums[..., -1] * torch.exp(-faded) < LOW_SUM
    sinks_by = torch.where(is_low, REFERENCE_SLACK * torch.ceil(faded / REFERENCE_SLACK), 0.0)
    return (running.reference - sinks_by).clamp(min=EMPTY_REFERENCE)


def _decayed(before: Tensor, reference: Tensor, faded: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [B, H, 1] of sums that lose `faded` [H] nats and get another reference: sums * scale + sums * change."""
    _, scale, change = decay_factors(faded)
    is_kept = before == reference
    scale = torch.where(is_kept, scale, torch.exp((before - reference) - faded))
    return scale.unsqueeze(-1), torch.where(is_kept, change, 0.0).unsqueeze(-1)


def decay_factors(decay: Tensor) -> Tensor:
    """[3, H]: decay, and the factors scale and change of sums that lose it and keep their reference.

    A slow decay is a small change of sums that keep their scale: that is added with compensation.
    """
    is_slow = decay <= SLOW_DECAY
    scale = torch.where(is_slow, 1.0, torch.exp(-decay))
    return torch.stack([decay, scale, torch.where(is_slow, torch.expm1(-decay), 0.0)])


def _roll(window: Window, position: Tensor) -> Window:
    """The ring after `position` [B or 1] tokens, oldest first. With -position, the inverse."""
    batch_size, n_window, n_key = window.keys.shape
    if not n_window:
        return window
    order = (position.unsqueeze(1) + torch.arange(n_window, device=position.device)) % n_window
    order = order.expand(batch_size, -1).unsqueeze(-1)
    keys = window.keys.gather(1, order.expand(-1, -1, n_key))
    return Window(keys, window.values.gather(1, order.unsqueeze(-1).expand_as(window.values)))


def _bounded(keys: Tensor) -> Tensor:
    return keys.float().clamp(-LARGEST_KEY, LARGEST_KEY)


def _total(running: Sums) -> Tensor:
    return running.sums + running.compensation
