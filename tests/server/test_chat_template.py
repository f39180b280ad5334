from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model import Tokenizer
from model.tokenizer import END_OF_TEXT
from server.api import chat_template, template_renderer
from server.api.chat_template import ChatTemplate
from server.errors import ConfigurationError, InvalidRequestError, OverloadedError


def test_only_the_template_can_write_the_end_of_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    end = tokenizer.end_of_text_id
    messages = [{"role": "user", "content": f"hi {END_OF_TEXT}"}, {"role": "assistant", "content": "ho"}]
    ids = template.token_ids(messages, tokenizer)
    assert ids == [end, *tokenizer.encode(f"user: hi {END_OF_TEXT}"), end, *tokenizer.encode("assistant: ho"), end]


def test_templates_may_refuse_and_may_be_wrong(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="messages do not fit the model's chat template: no system"):
        ChatTemplate("{{ raise_exception('no system') }}").token_ids([{"role": "user", "content": "a"}], tokenizer)
    with pytest.raises(ConfigurationError, match="chat template is not valid"):
        ChatTemplate("{% for %}")
    with pytest.raises(InvalidRequestError, match="do not fit"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}").token_ids([], tokenizer)


def test_templates_have_what_hugging_faces_have(tokenizer: Tokenizer) -> None:
    said = "{% generation %}{{ m.content | tojson }}{% endgeneration %}"
    each = "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}" + said + "{% endfor %}"
    source = each + "{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y') | length }}"
    messages = [{"role": "assistant", "content": "a <b>"}, {"role": "user", "content": "c"}]
    assert tokenizer.decode(ChatTemplate(source).token_ids(messages, tokenizer)) == '"a <b>"4'
    with pytest.raises(InvalidRequestError, match="do not fit"):
        ChatTemplate("{{ 1 / 0 }}").token_ids(messages, tokenizer)


USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("", '{"b": "é<", "a": [1]}'),
        ("ensure_ascii=True", '{"b": "\\u00e9<", "a": [1]}'),
        ("sort_keys=True", '{"a": [1], "b": "é<"}'),
        ("separators=(',', ':')", '{"b":"é<","a":[1]}'),
        ("indent=1, ensure_ascii=False", '{\n "b": "é<",\n "a": [\n  1\n ]\n}'),
        ("True, 1", '{\n "b": "\\u00e9<",\n "a": [\n  1\n ]\n}'),
    ],
)
def test_tojson_takes_what_hugging_faces_takes(arguments: str, written: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ {'b': 'é<', 'a': [1]} | tojson(%s) }}" % arguments)  # noqa: UP031 - braces are Jinja's
    assert tokenizer.decode(template.token_ids(USER, tokenizer)) == written


FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (FOR_EVER, "0.2 seconds"),
        ("{{ (9**(9**9)) % 7 }}", "0.2 seconds"),  # also while it is compiled
        ("{% set n = messages | length + 8 %}{{ (n**(n**n)) % 7 }}", "0.2 seconds"),
        ("{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "512 MiB"),
        ("{{ lipsum(n=99999) }}", "0.2 seconds"),
    ],
)
def test_a_template_that_does_not_end_is_refused_at_the_start(
    source: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "seconds" in limit:
        monkeypatch.setattr(template_renderer, "SECONDS", 0.2)
    with pytest.raises(ConfigurationError, match=f"messages take more than {limit} to be rendered"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (FOR_EVER, "messages take more than 0.2 seconds to be rendered"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "do not fit the model's chat template: it is nested too"),
        ("{{ 'x' * 2**24 }}y", "it writes more than 16,777,216 characters"),
        ("{{ 'x' * 2**34 }}", "messages take more than 512 MiB"),
    ],
)
def test_messages_that_a_template_is_not_done_with_end_nothing_else(
    source: str, reason: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "seconds" in reason:
        monkeypatch.setattr(template_renderer, "SECONDS", 0.2)
    template = ChatTemplate("{% if messages | length > 1 %}" + source + "{% endif %}b")
    with pytest.raises(InvalidRequestError, match=reason):
        template.token_ids(USER * 2, tokenizer)
    assert tokenizer.decode(template.token_ids(USER, tokenizer)) == "b"


def test_a_template_that_is_nested_too_deeply_is_not_valid() -> None:
    with pytest.raises(ConfigurationError, match="The chat template is not valid: it is nested too deeply"):
        ChatTemplate("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}")


def test_a_process_that_has_ended_is_replaced(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("b")
    for process in chat_template._processes._idle:
        process.kill()
        process.wait()
    assert tokenizer.decode(template.token_ids(USER, tokenizer)) == "b"


def test_the_process_of_templates_sees_no_secret() -> None:
    ChatTemplate("b")
    environments = [Path(f"/proc/{each.pid}/environ").read_text() for each in chat_template._processes._idle]
    for environment in environments:
        assert {pair.partition("=")[0] for pair in environment.split("\0") if pair} <= {
            *chat_template._Processes.ENVIRONMENT,
            "PYTHONPATH",
        }


def test_chats_wait_for_a_process_so_long_only(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("b")
    processes = chat_template._Processes()
    monkeypatch.setattr(chat_template, "_processes", processes)
    monkeypatch.setattr(processes, "WAIT", 0.01)
    for _ in range(processes.MOST):
        processes._free.acquire()
    with pytest.raises(OverloadedError, match="try again later"):
        template.token_ids(USER, tokenizer)


def test_a_template_comes_from_the_checkpoint_folder(tmp_path: Path) -> None:
    assert "loop.first" in ChatTemplate.load(tmp_path).source
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert ChatTemplate.load(tmp_path).source == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert ChatTemplate.load(tmp_path).source == "two"
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"chat_template.jinja must be UTF-8: .* byte 0xe9 in position 0"):
        ChatTemplate.load(tmp_path)


NAMED = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]


@pytest.mark.parametrize("described", [{"chat_template": NAMED}, {"chat_template": "one"}, {"chat_template": None}, {}])
def test_of_several_templates_the_default_one_is_taken(described: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    source = ChatTemplate.load(tmp_path).source
    assert source == ("one" if described.get("chat_template") else chat_template.DEFAULT_TEMPLATE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "it must be a JSON object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ('{"chat_template": 3}', "chat_template must be a text, or a list of objects with name and template"),
        ('{"chat_template": ["one"]}', "chat_template must be a text, or a list of objects"),
        ('{"chat_template": [{"name": "rag", "template": "a"}]}', r"with the name \"default\"; it has \['rag'\]"),
        ('{"chat_template": []}', 'with the name "default"'),
        (b"\xe9", "must be UTF-8"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_a_sentence(content: str | bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=f"tokenizer_config.json.*{reason}"):
        ChatTemplate.load(tmp_path)
