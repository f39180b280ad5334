"""The program that tries grammars, in a process with limits: never imported.

The first line it reads is the vocabulary, each one after that a grammar. Whatever that does here, its end is that of
this process: by the limit of its memory, by its alarm, or by a fault.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial

from llguidance import LLTokenizer, TokenizerWrapper

from server.grammars import sources
from server.limited_program import serve

STACK = 2**20  # bytes; a thread of the server has more, so that what fits here fits there


class Vocabulary:
    """As llguidance wants to see it. Without the tokenizer, it takes the longest token first."""

    bos_token_id = None
    tokenizer: LLTokenizer | None = None

    def __init__(self, tokens: list[str], special_ids: list[int], end_of_text_id: int) -> None:
        self.tokens = [token.encode("latin-1") for token in tokens]
        self.special_token_ids, self.eos_token_id = special_ids, end_of_text_id

    def __call__(self, text: bytes | str) -> list[int]:
        whole = text if isinstance(text, str) else text.decode()
        return self.tokenizer.greedy_tokenize(whole) if self.tokenizer else []


def answer(tokenizer: LLTokenizer, kind: str, text: str) -> dict[str, str]:
    """The grammar's source, or the problem that it has."""
    try:
        source = sources.read(kind, text)
    except (ValueError, RecursionError) as error:
        return {"problem": str(error) or "it is nested too deeply"}
    _, problem = sources.start(tokenizer, source)
    return {"problem": problem} if problem else {"source": source}


def main() -> None:
    vocabulary = Vocabulary(**json.loads(sys.stdin.buffer.readline()))
    tokenizer = vocabulary.tokenizer = LLTokenizer(TokenizerWrapper(vocabulary))
    serve(partial(answer, tokenizer))


if __name__ == "__main__":
    threading.stack_size(STACK)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
