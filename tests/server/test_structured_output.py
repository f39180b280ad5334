from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from model import Tokenizer
from model.sampling import Grammar
from server.engine import structured_output
from server.engine.structured_output import GrammarCompiler
from server.errors import GenerationError, InvalidRequestError


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def test_a_matcher_follows_the_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Grammar("regex", "ab*"))
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert {b"a"} <= {tokenizer.token_bytes[i] for i in matcher.allowed().nonzero().flatten().tolist()} <= {b"a", b"ab"}
    fork = matcher.copy()
    matcher.observe(a)
    assert matcher.allowed()[b]
    assert matcher.allowed()[tokenizer.end_of_text_id]
    assert not matcher.is_complete
    assert not fork.allowed()[b]
    logits = torch.zeros(tokenizer.vocab_size)
    matcher.adjust(logits)
    assert torch.equal(logits == 0, matcher.allowed())
    matcher.observe(tokenizer.end_of_text_id)
    assert matcher.is_complete
    with pytest.raises(GenerationError, match="The grammar failed"):
        fork.observe(b)


def test_a_grammar_may_need_characters_that_the_vocabulary_lacks(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(Grammar("regex", "😀"))
    for byte in "😀".encode():
        (token_id,) = matcher.allowed().nonzero().flatten().tolist()
        assert tokenizer.token_bytes[token_id] == bytes([byte])
        matcher.observe(token_id)
    assert matcher.is_complete


def test_grammars_are_compiled_once_and_the_last_used_kept(compiler: GrammarCompiler) -> None:
    grammars = [Grammar("regex", f"a{{{i + 1}}}") for i in range(3)]
    with (
        mock.patch.object(structured_output, "MAX_CACHED_GRAMMARS", 2),
        mock.patch.object(compiler, "_compile", wraps=compiler._compile) as compile_,
    ):
        for i in (0, 1, 0, 2, 0):
            compiler.compile(grammars[i])
        assert compile_.call_count == 3
        compiler.compile(grammars[1])
        assert compile_.call_count == 4


def test_it_may_be_called_from_many_threads(compiler: GrammarCompiler) -> None:
    grammars = [Grammar("regex", f"a{{{i % 5 + 1}}}") for i in range(400)]
    with mock.patch.object(structured_output, "MAX_CACHED_GRAMMARS", 2), ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(compiler.compile, grammars))) == 400


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "("), "not a valid regex"),
        (Grammar("json_schema", "{"), "not a JSON schema"),
        (Grammar("json_schema", "[" * 100_000), "not a JSON schema"),
        (Grammar("json_schema", '{"type": "poem"}'), "not a valid json_schema"),
    ],
)
def test_bad_grammars_are_refused(grammar: Grammar, message: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match=f"^grammar is {message}"):
        compiler.compile(grammar)
