"""Files of conversations that no server wrote, with right checksums."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator

TORCH = {"F32": "torch.float32", "I64": "torch.int64"}
Tensors = dict[str, tuple[str, list[int], bytes]]  # dtype, shape and bytes by name


def crafted(good: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """(what is wrong, file), made of a good file; nothing if that is empty."""
    if not good:
        return
    metadata, tensors = taken_apart(good)
    dtype, shape, _ = tensors["position"]
    for position in (-1, 2**53 + 1, 2**62, 2**63 - 1):
        yield "an impossible position", file_of(metadata, {**tensors, "position": (dtype, shape, pack("q", position))})
    yield "a position without dimensions", file_of(metadata, {**tensors, "position": (dtype, [], pack("q", 5))})
    floats = [name for name, (kind, _, _) in tensors.items() if kind == "F32"]
    name = chance.choice(floats)
    kind, shape, data = tensors[name]
    n = len(data) // 4
    for what, number in (("infinity", float("inf")), ("not a number", float("nan"))):
        yield what, file_of(metadata, {**tensors, name: (kind, shape, pack("f", number) * n)})
    for other in ("F4", "F6_E2M3", "F8_E8M0", "C64", "BOOL", "nothing"):
        yield f"the dtype {other}", file_of(metadata, {**tensors, name: (other, shape, data)})
    yield "a tensor that is missing", file_of(metadata, {key: value for key, value in tensors.items() if key != name})
    yield "a tensor more", file_of(metadata, {**tensors, "more": ("F32", [1], pack("f", 0.0))})
    yield "another shape", file_of(metadata, {**tensors, name: (kind, [n], data)})
    unread = pack("q", 5) * 400_000
    yield "400,000 unread tokens", file_of(metadata, {**tensors, "unread_ids": ("I64", [400_000], unread)})
    yield "an unknown token", file_of(metadata, {**tensors, "unread_ids": ("I64", [1], pack("q", 10**9))})
    for field in ("format", "version", "state_version", "model"):
        yield f"another {field}", file_of({**metadata, field: "x" * 100}, tensors)
    yield "a header without end", struct.pack("<Q", 2**63 - 1) + good[8:]
    yield "a header nested deeply", struct.pack("<Q", 200_000) + b"[" * 200_000
    yield "nothing in it", b""


def taken_apart(file: bytes) -> tuple[dict[str, str], Tensors]:
    """Metadata without the checksum, and tensors."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    metadata = header.pop("__metadata__")
    metadata.pop("checksum")
    body = file[end:]
    return metadata, {
        name: (one["dtype"], one["shape"], body[slice(*one["data_offsets"])]) for name, one in header.items()
    }


def file_of(metadata: dict[str, str], tensors: Tensors) -> bytes:
    """safetensors, with the checksum that its server will compute."""
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, (dtype, shape, data) in sorted(tensors.items()):
        digest.update(f"{name} {TORCH.get(dtype, dtype)} {shape} ".encode() + data)
    header: dict[str, object] = {"__metadata__": {**metadata, "checksum": digest.hexdigest()}}
    start = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, _, data in tensors.values())


def pack(kind: str, number: float) -> bytes:
    return struct.pack(f"<{kind}", number)
