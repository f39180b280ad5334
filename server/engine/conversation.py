"""What a text leaves behind, so that another request goes on from it; also as one file.

The file is safetensors: a header of JSON, then the bytes of each tensor. Nothing in it is executed, and everything in
it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.state import AFTState
from server.engine.snapshot import Snapshot
from server.errors import InvalidConversationError

FORMAT, VERSION = "aft-conversation", 2
POSITION, LOGITS, UNREAD = "position", "logits", "unread_ids"
LAYER_NAMES = ("reference", "sums", "compensation", "keys", "values", "shifted")


@dataclass(frozen=True)
class Conversation:
    """snapshot: after the tokens that were read; unread_ids: tokens that were chosen since, and are to be read next."""

    snapshot: Snapshot
    unread_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.snapshot.state.position[0]) + len(self.unread_ids)

    def to_bytes(self, fingerprint: bytes) -> bytes:
        """fingerprint: of the model whose state this is."""
        tensors = _named(self.snapshot.state)
        if self.snapshot.logits is not None:
            tensors[LOGITS] = self.snapshot.logits
        tensors[UNREAD] = torch.tensor(self.unread_ids, dtype=torch.long)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "model": fingerprint.hex()}
        return save(tensors, {**metadata, "checksum": _checksum(metadata, tensors)})

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: bytes, empty: AFTState, vocab_size: int) -> Self:
        """The inverse. empty: the model's state before its first token, which has the right shapes.

        Raises InvalidConversationError, in a sentence, for anything that `to_bytes` of this model would not write.
        """
        metadata = _metadata(data)
        if metadata.get("format") != FORMAT:
            raise InvalidConversationError("This is not a conversation of this server.")
        if metadata.get("version") != str(VERSION):
            raise InvalidConversationError(
                f"The conversation has version {metadata.get('version')!r} of the format; this server reads {VERSION}."
            )
        if metadata.get("model") != fingerprint.hex():
            raise InvalidConversationError("The conversation is another model's, and means nothing to this one.")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise InvalidConversationError(f"The conversation is damaged: {error}.") from error
        claimed = metadata.pop("checksum", None)
        if claimed != _checksum(metadata, tensors):
            raise InvalidConversationError("The conversation is damaged: its checksum is not that of its content.")
        _check_shapes(tensors, empty, vocab_size)
        return cls._from_tensors(tensors, empty)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], empty: AFTState) -> Self:
        device = empty.position.device
        state = AFTState.from_tensors([tensors[name].to(device) for name in _named(empty)])
        return cls(Snapshot(state.clone(), tensors.get(LOGITS)), tuple(tensors[UNREAD].tolist()))


def _named(state: AFTState) -> dict[str, Tensor]:
    position, *parts = state.tensors()
    names = [f"layers.{i}.{name}" for i in range(len(state.layers)) for name in LAYER_NAMES]
    return {POSITION: position, **dict(zip(names, parts, strict=True))}


def _metadata(data: bytes) -> dict[str, Any]:
    """What the header says besides the tensors; {} if there is no such header."""
    length = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + length])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_shapes(tensors: Mapping[str, Tensor], empty: AFTState, vocab_size: int) -> None:
    """A right checksum tells of a file that was not damaged, not of one that was made well."""
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in _named(empty).items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items() if name not in (LOGITS, UNREAD)}
    unread, logits = tensors.get(UNREAD), tensors.get(LOGITS)
    valid = (
        found == expected
        and unread is not None
        and unread.dtype == torch.long
        and unread.ndim == 1
        and bool(((unread >= 0) & (unread < vocab_size)).all())
        and (logits is None or (logits.dtype == torch.float32 and logits.shape == (vocab_size,)))
        and bool((tensors[POSITION] >= 0).all())
        and not any(bool(tensor.isnan().any()) for tensor in tensors.values())
    )
    if not valid:
        raise InvalidConversationError("The conversation does not have the tensors of this model's state.")
