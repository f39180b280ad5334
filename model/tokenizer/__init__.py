"""Text to token ids and back. A checkpoint's tokenizer is known by the name of its file."""

from pathlib import Path

from model.errors import TokenizationError
from model.tokenizer.base import END_OF_TEXT, Tokenizer
from model.tokenizer.export import hugging_face_files
from model.tokenizer.hugging_face import HuggingFaceTokenizer
from model.tokenizer.sentence_piece import SentencePieceTokenizer
from model.tokenizer.world import WorldTokenizer

__all__ = [
    "END_OF_TEXT",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WorldTokenizer",
    "hugging_face_files",
    "load_tokenizer",
]

FILE_NAMES = [kind.file_name for kind in (SentencePieceTokenizer, HuggingFaceTokenizer, WorldTokenizer)]
AUTHORS_NAMES = ["rwkv_vocab_v*.txt", "20B_tokenizer.json"]  # beside RWKV's .pth files


def load_tokenizer(path: Path) -> Tokenizer:
    """path: a tokenizer's file, or a folder that has one. Raises TokenizationError."""
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if found[:2] == [path / SentencePieceTokenizer.file_name, path / HuggingFaceTokenizer.file_name]:
            del found[1]  # the same for programs of others
        found = found or [file for pattern in AUTHORS_NAMES for file in sorted(path.glob(pattern))]
        if len(found) != 1:
            which = ", ".join(file.name for file in found) or "none"
            raise TokenizationError(f"{path.absolute()} must have one of {', '.join(FILE_NAMES)}; it has {which}.")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizationError(f"{path} cannot be read: {error}.") from error
    by_suffix: dict[str, type[Tokenizer]] = {".json": HuggingFaceTokenizer, ".txt": WorldTokenizer}
    try:
        return by_suffix.get(path.suffix, SentencePieceTokenizer)(content)
    except TokenizationError as error:
        raise TokenizationError(f"{path.name}: {error}") from error
