"""Text that must match a JSON schema or a regular expression.

Through llguidance, chosen over xgrammar and outlines-core because it takes a vocabulary as raw bytes, which is what a
sentencepiece model with byte fallback is; because it computes masks lazily, so that no schema takes long to compile;
and because it needs neither a Hugging Face tokenizer nor a compiler.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from model.sampling import Grammar
from model.tokenizer import Tokenizer
from server.errors import GenerationError, InvalidRequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_CACHED_GRAMMARS = 256
# A tenth of llguidance's own: a mask that needs more would hold up everyone else's tokens.
LIMITS = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=20_000, step_max_items=5_000)
# Spaces as Python's json writes them. Where any white space may stand, a small model fills a text with it.
JSON_FORMAT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        if problem := self.problem:
            raise GenerationError(f"The grammar failed: {problem}.")

    @property
    def problem(self) -> str | None:
        """Why the grammar has failed, if it has. What follows the first line is llguidance's inside."""
        return self._matcher.get_error().splitlines()[0] if self._matcher.is_error() else None


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. May be called from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of `grammar`. Raises InvalidRequestError if that is not valid."""
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)  # unlocked: a slow grammar must not hold up the others
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher.copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            if grammar.kind == "regex":
                source = LLMatcher.grammar_from_regex(grammar.source)
            else:
                json.loads(grammar.source)
                source = LLMatcher.grammar_from_json_schema(grammar.source, defaults=JSON_FORMAT)
        except (ValueError, RecursionError) as error:
            what = "regular expression" if grammar.kind == "regex" else "JSON schema"
            raise InvalidRequestError(f"grammar is not a {what}: {error}.") from error
        problem = LLMatcher.validate_grammar(source, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise InvalidRequestError(f"grammar is not a valid {grammar.kind}: {problem.splitlines()[0]}.")
        matcher = Matcher(LLMatcher(self._tokenizer, source, limits=LIMITS))
        try:
            matcher.allowed()  # the first mask costs most: here rather than in a step that others wait for
        except GenerationError as error:
            raise InvalidRequestError(f"grammar cannot be followed: {matcher.problem}.") from error
        return matcher


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
