"""The state after some tokens, kept to go on from; what names it; and as a file.

The file is safetensors: a header of JSON, then the bytes of each tensor. Nothing in it is executed, and everything in
it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from model.language_model import LanguageModel
from model.state import State
from server.errors import InvalidConversationError

FORMAT, VERSION, READABLE_VERSIONS = "aft-conversation", "3", ("2", "3")
POSITION, LOGITS, UNREAD = "position", "logits", "unread_ids"
SEGMENT = 256  # tokens
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 2048, 256  # of a safetensors file: about twice of what is needed


class Key(NamedTuple):
    """Of the state `length` tokens after a beginning. segment: the name that it had at the last multiple of SEGMENT
    before, by which those are found that a text may go through.
    """

    name: bytes
    length: int
    segment: bytes


class KeyHash:
    """Names states by how they came about: the name of a beginning, and the tokens read since.

    Names of different salts have nothing in common. Tokens are hashed fastest as array("i").
    """

    def __init__(self, beginning: bytes, salt: str = "") -> None:
        person = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
        self._hash = hashlib.blake2b(beginning, digest_size=16, person=person)
        self._segment, self.length = self.name, 0

    @property
    def name(self) -> bytes:
        return self._hash.digest()

    @property
    def key(self) -> Key:
        return Key(self.name, self.length, self._segment)

    def read(self, token_ids: Sequence[int]) -> Self:
        ids = memoryview(token_ids if isinstance(token_ids, array) else array("i", token_ids))
        while len(ids):
            room = SEGMENT - self.length % SEGMENT
            if room == SEGMENT:
                self._segment = self.name
            self._hash.update(ids[:room])
            self.length += min(room, len(ids))
            ids = ids[room:]
        return self

    def copy(self) -> Self:
        copy = object.__new__(type(self))
        copy._hash, copy._segment, copy.length = self._hash.copy(), self._segment, self.length
        return copy


@dataclass(frozen=True)
class Snapshot:
    """The state [1, ...] after a sequence, its name, and the logits [V] of the token that follows, if computed."""

    state: State
    logits: Tensor | None
    name: bytes

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (self.logits.nbytes if self.logits is not None else 0)


class StateFiles:
    """States of one model as bytes.

    fingerprint: of the model; empty: its state before the first token, which has the right shapes; family: what says
    which states a text can leave, and the version of their tensors; max_tokens: that a conversation may have.
    """

    def __init__(
        self, fingerprint: bytes, empty: State, vocab_size: int, family: type[LanguageModel], max_tokens: int
    ) -> None:
        self._fingerprint, self._empty, self._vocab_size = fingerprint.hex(), empty, vocab_size
        self._family, self._max_tokens = family, max_tokens
        self._state_version = str(family.state_version)

    @property
    def max_bytes(self) -> int:
        """Of a file: the state, the logits that follow, a token to be read next, and a header with a line for each."""
        return self._empty.nbytes + 4 * self._vocab_size + self._max_header_bytes

    @property
    def _max_header_bytes(self) -> int:
        return HEADER_BYTES + HEADER_BYTES_PER_TENSOR * (len(self._empty.tensors()) + 2)

    def write(self, snapshot: Snapshot, unread_ids: Sequence[int] = (), key: bytes = b"") -> bytes:
        """unread_ids: of the token that was chosen since, if there is one; key: what the file is to be found by."""
        tensors = _not_empty(snapshot.state.named())
        if snapshot.logits is not None:
            tensors[LOGITS] = snapshot.logits
        tensors[UNREAD] = torch.tensor(unread_ids, dtype=torch.long)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "state_version": self._state_version,
            "model": self._fingerprint,
        }
        if key:
            metadata["key"] = key.hex()
        return save(tensors, {**metadata, "checksum": _checksum(metadata, tensors)})

    def read(self, data: bytes, key: bytes = b"") -> tuple[Snapshot, tuple[int, ...]]:
        """The inverse. A state from a file is named by the file's content.

        key: what it was found by, which a file that says of what it was written for must have in it. Raises
        InvalidConversationError, in a sentence, for anything that `write` for this model would not write.
        """
        if (n_bytes := int.from_bytes(data[:8], "little")) > self._max_header_bytes:
            raise InvalidConversationError(
                f"The conversation has a header of {n_bytes} bytes, but one of this model has at most "
                f"{self._max_header_bytes}."
            )
        metadata = _metadata(data)
        if metadata.get("format") != FORMAT:
            raise InvalidConversationError("This is not a conversation of this server.")
        if metadata.get("version") not in READABLE_VERSIONS:
            raise InvalidConversationError(
                f"The conversation has version {metadata.get('version')!r:.40} of the format; this server reads "
                f"{' and '.join(READABLE_VERSIONS)}."
            )
        if metadata.get("model") != self._fingerprint:
            raise InvalidConversationError("The conversation is another model's, and means nothing to this one.")
        if (version := metadata.get("state_version", "1")) != self._state_version:  # version 2 had none
            raise InvalidConversationError(
                f"The conversation has version {version!r:.40} of this model's state; this server reads "
                f"{self._state_version!r}."
            )
        try:
            tensors = load(data)
        except Exception as error:  # safetensors has many for what is no file of tensors, or has dtypes of others
            raise InvalidConversationError(f"The conversation is damaged: {error!s:.200}.") from error
        checksum = metadata.pop("checksum", None)
        if checksum != _checksum(metadata, tensors):
            raise InvalidConversationError("The conversation is damaged: its checksum is not that of its content.")
        if key and metadata.get("key", key.hex()) != key.hex():  # those of 0.2.0 have none
            raise InvalidConversationError("It is what follows other tokens.")
        logits, unread = tensors.pop(LOGITS, None), tensors.pop(UNREAD, None)
        tensors = _not_empty(tensors)
        if not (self._fits(tensors) and self._fit(logits, unread)):
            raise InvalidConversationError("The conversation does not have the tensors of this model's state.")
        assert unread is not None
        state = self._empty.like(tensors.get(name, empty) for name, empty in self._empty.named().items())
        self._check(state, len(unread))
        state = self._empty.like(tensor.to(self._empty.position.device) for tensor in state.tensors())
        return Snapshot(state.clone(), logits, bytes.fromhex(checksum)), tuple(unread.tolist())

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """A right checksum tells of a file that was not damaged, not of one that was made well."""
        expected = {name: (tensor.dtype, tensor.shape) for name, tensor in _not_empty(self._empty.named()).items()}
        return expected == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def _fit(self, logits: Tensor | None, unread: Tensor | None) -> bool:
        size = self._vocab_size
        return (
            unread is not None
            and unread.dtype == torch.long
            and unread.ndim == 1
            and bool(((unread >= 0) & (unread < size)).all())
            and (
                logits is None
                or (logits.dtype == torch.float32 and logits.shape == (size,) and bool(logits.isfinite().all()))
            )
        )

    def _check(self, state: State, n_unread: int) -> None:
        position = int(state.position)
        if not 0 <= position + n_unread <= self._max_tokens:
            raise InvalidConversationError(
                f"The conversation has {position + n_unread} tokens, but from 0 to {self._max_tokens} are allowed here."
            )
        if n_unread > 1:
            raise InvalidConversationError(
                f"The conversation has {n_unread} tokens that were not read, but a text leaves at most 1."
            )
        if position < 0 or not all(self._family.is_possible(layer, position) for layer in state.layers):
            raise InvalidConversationError("The conversation has a state that no text can have left.")


def _not_empty(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What holds nothing is not written. Version 2 had some: each family's tensors were in every model's files."""
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
