from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from model import Tokenizer
from model.sampling import Grammar
from server.engine import structured_output
from server.engine.structured_output import GrammarCompiler
from server.errors import GenerationError, InvalidRequestError
from server.grammars import process


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, 60)
    yield compiler
    compiler.close()


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


def pids(compiler: GrammarCompiler) -> list[int]:
    processes = compiler._processes
    return [process._process.pid for process in (*processes._idle, *processes._busy)]


def exists(pid: int) -> bool:
    """Whether a process is there, and more than its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_is_there_when_it_is_needed_and_used_again(compiler: GrammarCompiler) -> None:
    assert pids(compiler) == []
    compiler.compile(GOOD)
    (pid,) = pids(compiler)
    compiler.compile(Grammar("regex", "a*b"))
    assert pids(compiler) == [pid]
    os.kill(pid, signal.SIGKILL)
    compiler.compile(Grammar("regex", "a*c"))  # by another one
    (other,) = pids(compiler)
    compiler.close()
    assert pids(compiler) == []
    assert not exists(pid)
    assert not exists(other)
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        compiler.compile(Grammar("regex", "a*d"))


def test_a_compiler_that_is_forgotten_leaves_no_process(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 60)
    compiler.compile(GOOD)
    (pid,) = pids(compiler)
    del compiler
    gc.collect()
    assert not exists(pid)


def test_a_slow_grammar_is_ended(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 0.2)
    with pytest.raises(InvalidRequestError, match=r"it takes more than the 0\.2 seconds it may take here"):
        compiler.compile(SLOW)
    assert pids(compiler) == []


def test_a_large_grammar_is_ended(tokenizer: Tokenizer) -> None:
    with mock.patch.object(process, "MEMORY", 2**20):
        small = GrammarCompiler(tokenizer, 60)
    with pytest.raises(InvalidRequestError, match="it takes more memory, or is nested more deeply, than it may here"):
        small.compile(LARGE)
    assert pids(small) == []


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_dies_takes_its_grammar_with_it(how: signal.Signals, compiler: GrammarCompiler) -> None:
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(compiler.compile, SLOW)
        while not compiler._processes._busy or next(iter(compiler._processes._busy)).is_new:
            time.sleep(0.01)
        os.kill(pids(compiler)[0], how)
        with pytest.raises(InvalidRequestError, match="it takes more memory, or is nested more deeply"):
            refused.result(60)
    compiler.compile(GOOD)


ORPHANING = f"""
import threading, time
from server.grammars.process import GrammarProcesses

processes = GrammarProcesses([bytes([i]) for i in range(256)] + [b""], [256], 256, 1)
processes.try_("regex", "a")
(idle,) = processes._idle
other = GrammarProcesses([bytes([i]) for i in range(256)] + [b""], [256], 256, 1)
other.try_("regex", "a")
threading.Thread(target=other.try_, args=("json_schema", {SLOW.source!r})).start()
while not other._busy:
    pass
(busy,) = other._busy
print(idle._process.pid, busy._process.pid, flush=True)
time.sleep(60)
"""


def test_no_process_outlives_a_server_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANING], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        left = [int(pid) for pid in server.stdout.readline().split()]
        server.kill()
    assert len(left) == 2
    deadline = time.monotonic() + 60
    while any(exists(pid) for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)
