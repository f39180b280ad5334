from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from model import Tokenizer
from model.sampling import Grammar
from server import limited_processes
from server.engine import structured_output
from server.engine.structured_output import GrammarCompiler
from server.errors import GenerationError, InvalidRequestError


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, 60)
    yield compiler
    compiler.processes.close()


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
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)abc"), "look-around, including look-ahead and look-behind, is not supported"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", r"\Aabc\Z"), "unrecognized escape sequence"),
        (Grammar("regex", r"a\b"), r"look-around, .* is not supported \(WordUnicode\)"),
        (Grammar("regex", "a\\"), ".* ends with a lone backslash"),
        (Grammar("json_schema", '{"type": "string", "pattern": "a\\\\"}'), ".* ends with a lone backslash"),
        (Grammar("regex", "a{99999999999}"), "decimal literal invalid"),
        (Grammar("json_schema", "{"), "Expecting property name .*"),
        (Grammar("json_schema", '{"type": "poem"}'), "Invalid type: poem"),
        (Grammar("json_schema", '{"type": "string", "pattern": "(?=x)x"}'), "look-around, .* is not supported"),
        (Grammar("json_schema", '{"$ref": "#"}'), "nothing can match it"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}'), "Unsatisfiable schema: .*"),
        (Grammar("grammar", "root ::= ["), "Unexpected end of input .*"),
        (Grammar("grammar", "start: other"), 'unknown name: "other"'),
        (Grammar("grammar", 'start: %json {"const": 9007199254740993}'), "%json is not supported"),
    ],
)
def test_bad_grammars_are_refused_with_the_reason_and_the_field(
    grammar: Grammar, message: str, compiler: GrammarCompiler
) -> None:
    named = dataclasses.replace(grammar, name="a.field")
    with pytest.raises(InvalidRequestError, match=rf"^a\.field cannot be followed: {message}\.$"):
        compiler.compile(named)


@pytest.mark.parametrize("text", ['root ::= "ab" | "c"', 'start: "ab" | "c"'])
def test_grammars_in_the_form_of_llama_cpp_and_of_lark(
    text: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    allowed = compiler.compile(Grammar("grammar", text)).allowed().nonzero().flatten().tolist()
    assert {tokenizer.token_bytes[i] for i in allowed} in ({b"a", b"c"}, {b"a", b"ab", b"c"})


GOOD = Grammar("regex", "ab*")
# llguidance is asked for a product of automata, which would take hours.
SLOW = Grammar.json_schema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 15)]})
LARGE = Grammar("regex", "|".join(rf"\p{{L}}{i}" for i in range(20_000)))


def test_a_slow_grammar_is_ended(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 0.2)
    with pytest.raises(InvalidRequestError, match=r"it takes more than the 0\.2 seconds it may take here"):
        compiler.compile(SLOW)


def test_a_large_grammar_is_ended(tokenizer: Tokenizer) -> None:
    with mock.patch.object(limited_processes, "MEMORY", 2**20):
        small = GrammarCompiler(tokenizer, 60)
    with pytest.raises(InvalidRequestError, match="it takes more memory, or is nested more deeply, than it may here"):
        small.compile(LARGE)
