from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model import Tokenizer
from model.tokenizer import END_OF_TEXT
from server.api import chat_template
from server.api.chat_template import ChatTemplate, encode
from server.errors import ConfigurationError, InvalidRequestError

USER = [{"role": "user", "content": "a"}]


def test_only_the_template_can_write_the_end_of_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    end = tokenizer.end_of_text_id
    messages = [{"role": "user", "content": f"hi {END_OF_TEXT}"}, {"role": "assistant", "content": "ho"}]
    ids = encode(template.render(messages), tokenizer)
    assert ids == [end, *tokenizer.encode(f"user: hi {END_OF_TEXT}"), end, *tokenizer.encode("assistant: ho"), end]


def test_templates_may_refuse_and_may_be_wrong() -> None:
    with pytest.raises(InvalidRequestError, match="messages do not fit the model's chat template: no system"):
        ChatTemplate("{{ raise_exception('no system') }}").render(USER)
    with pytest.raises(ConfigurationError, match="chat template is not valid"):
        ChatTemplate("{% for %}")
    with pytest.raises(InvalidRequestError, match="do not fit"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}").render([])


def test_templates_have_what_hugging_faces_have() -> None:
    said = "{% generation %}{{ m.content | tojson }}{% endgeneration %}"
    each = "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}" + said + "{% endfor %}"
    source = each + "{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y') | length }}"
    messages = [{"role": "assistant", "content": "a <b>"}, {"role": "user", "content": "c"}]
    assert ChatTemplate(source).render(messages) == ['"a <b>"4']
    with pytest.raises(InvalidRequestError, match="do not fit"):
        ChatTemplate("{{ 1 / 0 }}").render(messages)


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
def test_tojson_takes_what_hugging_faces_takes(arguments: str, written: str) -> None:
    template = ChatTemplate("{{ {'b': 'é<', 'a': [1]} | tojson(%s) }}" % arguments)  # noqa: UP031 - braces are Jinja's
    assert template.render(USER) == [written]


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
        monkeypatch.setattr(chat_template, "SECONDS", 0.2)
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
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "seconds" in reason:
        monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    template = ChatTemplate("{% if messages | length > 1 %}" + source + "{% endif %}b")
    with pytest.raises(InvalidRequestError, match=reason):
        template.render(USER * 2)
    assert template.render(USER) == ["b"]


def test_a_template_that_is_nested_too_deeply_is_not_valid() -> None:
    with pytest.raises(ConfigurationError, match="The chat template is not valid: it is nested too deeply"):
        ChatTemplate("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}")


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
