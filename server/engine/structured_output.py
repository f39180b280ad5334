"""Text that must match a JSON schema or a regular expression.

Through llguidance, chosen over xgrammar and outlines-core because it takes a vocabulary as raw bytes, which is what a
sentencepiece model with byte fallback is; because it computes masks lazily, so that few schemas take long to compile;
and because it needs neither a Hugging Face tokenizer nor a compiler.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from model.sampling import Grammar
from model.tokenizer import Tokenizer
from server.errors import GenerationError, InvalidRequestError
from server.grammars import sources
from server.limited_processes import LimitedProcesses

MAX_CACHED_GRAMMARS = 32  # of up to 10 MB


class Matcher:
    """Where a text stands in its grammar: a `model.sampling.Step`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())

    def allowed(self) -> Tensor:
        """Which tokens may follow, bool [V]. Raises GenerationError if the grammar has failed."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        self._check()
        return allowed

    def adjust(self, logits: Tensor) -> None:
        """Take from logits [V] the tokens that may not follow. Raises as `allowed`."""
        logits[~self.allowed()] = -math.inf

    def observe(self, token_id: int) -> None:
        """Go on by one token. Raises GenerationError if the grammar has failed."""
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if problem := sources.reason(self._matcher):
            raise GenerationError(f"The grammar failed: {problem}.")


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. May be called from any thread.

    A grammar is first tried in one of `processes`, and may compute for `timeout` seconds in all: what llguidance makes
    of it is not bounded, and may need minutes or gigabytes, or recurse until its process dies.
    """

    def __init__(self, tokenizer: Tokenizer, timeout: float) -> None:
        vocabulary = _Vocabulary(tokenizer)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary))
        self._timeout = timeout
        described = {
            "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
            "special_ids": vocabulary.special_token_ids,
            "end_of_text_id": vocabulary.eos_token_id,
        }
        # Half of the time is left for compiling it again.
        self.processes = LimitedProcesses("server.grammars.worker", timeout / 2, timeout, described)
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of `grammar`. Raises InvalidRequestError for a bad one, and ShuttingDownError."""
        if matcher := self.find(grammar):
            return matcher
        matcher = self._compile(grammar)  # unlocked: a slow grammar must not hold up the others
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher.copy()

    def find(self, grammar: Grammar) -> Matcher | None:
        """As `compile`, if the grammar is one of those kept."""
        with self._lock:
            if matcher := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
        return matcher.copy() if matcher else None

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            found = self.processes.ask({"kind": grammar.kind, "text": grammar.source})
        except TimeoutError:
            found = {"problem": f"it takes more than the {self._timeout:g} seconds it may take here"}
        except MemoryError:
            found = {"problem": "it takes more memory, or is nested more deeply, than it may here"}
        if not (problem := found.get("problem")):
            matcher, problem = sources.start(self._tokenizer, found["source"])
        if problem:
            raise InvalidRequestError(f"{grammar.name} cannot be followed: {problem}.")
        return Matcher(matcher)


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.end_of_text_id
        self.bos_token_id = None
        self.special_token_ids = [i for i, piece in enumerate(tokenizer.token_bytes) if not piece]
        # Special tokens need bytes of their own that no text has; 0xFF never occurs in UTF-8.
        self.tokens = [piece or b"\xff<%d>" % i for i, piece in enumerate(tokenizer.token_bytes)]

    def __call__(self, text: bytes | str) -> Sequence[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())
