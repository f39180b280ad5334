"""A sentencepiece tokenizer in the form of Hugging Face's libraries, for programs that make or count prompts."""

from __future__ import annotations

import json
from typing import Any

from model.tokenizer.base import END_OF_TEXT
from model.tokenizer.sentence_piece import SPACE, SentencePieceTokenizer

UNKNOWN = "<unk>"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": UNKNOWN,
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # what a text spells is text
}


def hugging_face_files(tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, by which AutoTokenizer gives the ids of `encode_text`."""
    written = json.dumps(_described(tokenizer), ensure_ascii=False, separators=(",", ":"))
    return {
        "tokenizer.json": (written + "\n").encode(),
        "tokenizer_config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
    }


def _described(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Spaces are spaces here, so sentencepiece's stand-in for them is a character like others, and comes as bytes."""
    end = tokenizer.end_of_text_id
    special = {tokenizer.unknown_id: UNKNOWN, end: END_OF_TEXT}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start, text = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    pieces = [special.get(i, tokenizer.piece(i).replace(SPACE, " ")) for i in range(tokenizer.vocab_size)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": special[i], **flags} for i in sorted(special)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, second],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end], "tokens": [END_OF_TEXT]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(tokenizer, pieces),
        },
    }


def _merges(tokenizer: SentencePieceTokenizer, pieces: list[str]) -> list[list[str]]:
    """Whatever two pieces make a third, the one of the best score first: sentencepiece asks for nothing else."""
    normal = {piece: i for i, piece in enumerate(pieces) if tokenizer.is_normal(i)}
    by_score = sorted(normal, key=lambda piece: -tokenizer.score(normal[piece]))
    splits = ((piece[:n], piece[n:]) for piece in by_score for n in range(1, len(piece)))
    return [[left, right] for left, right in splits if left in normal and right in normal]
