"""How schemas are read, and that what follows one is valid by its letter, for a validator of others."""

from __future__ import annotations

import decimal
import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import Tokenizer
from model.sampling import Grammar
from server.engine.structured_output import GrammarCompiler, Matcher
from server.errors import InvalidRequestError
from server.grammars.json_schema import LARGEST_BOUND, SchemaError, read

INTEGER = {"type": "integer"}
A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 60)


def compiled(compiler: GrammarCompiler, schema: Any) -> Matcher:
    return compiler.compile(Grammar.json_schema(schema))


def accepts(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar has the text, given byte by byte."""
    inner = matcher.copy()._matcher
    ids = [tokenizer.token_bytes.index(bytes([byte])) for byte in text.encode()]
    return bool(inner.try_consume_tokens(ids) == len(ids) and inner.is_accepting())


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        # who names properties means an object, wherever a schema stands
        ({"properties": {"a": INTEGER}, "required": ["a"]}, ['{"a": 3}'], ["-30.3", "null", '"a"']),
        ({"items": {"properties": {"a": INTEGER}}}, ["[]", '[{"a": 3}]', "[{}]"], ["{}", "[3]", "null"]),
        ({"required": ["a"]}, ['{"a": 3}', '{"a": {}, "b": 1}'], ["{}", "3"]),
        # declared properties only
        (A, ['{"a": 3}'], ['{"a": 3, "b": 1}', "{}"]),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 3}']),
        ({"properties": {"a": INTEGER}, "required": ["a", "b"]}, ['{"a": 3, "b": []}'], ['{"a": 3}']),
        ({"properties": {"o": A}}, ['{"o": {"a": 1}}'], ['{"o": {"a": 1, "b": 2}}']),
        ({**A, "unevaluatedProperties": False}, ['{"a": 3}'], ['{"a": 3, "b": 1}']),
        # unless more is asked for
        ({"type": "object"}, ["{}", '{"b": 1}'], ["3"]),
        ({**A, "additionalProperties": True}, ['{"a": 3, "b": 1}'], []),
        ({**A, "additionalProperties": INTEGER}, ['{"a": 3, "b": 1}'], ['{"a": 3, "b": "c"}']),
        ({**A, "patternProperties": {"^b": INTEGER}}, ['{"a": 3, "b": 1}', '{"a": 3, "c": 1}'], []),
        # together
        ({"allOf": [A]}, ['{"a": 3}'], ['{"a": 3, "b": 1}']),
        ({"anyOf": [A, {"type": "null"}]}, ['{"a": 3}', "null"], ['{"a": 3, "b": 1}']),
        (
            {"allOf": [A, {"properties": {"b": INTEGER}}], "properties": {"c": INTEGER}},
            ['{"a": 3}', '{"a": 3, "b": 1, "c": 2}'],
            ['{"a": 3, "d": 1}', '{"b": 1}'],
        ),
        (
            {"properties": {"k": INTEGER}, "anyOf": [A, {"properties": {"b": INTEGER}, "required": ["b"]}]},
            ['{"k": 1, "a": 3}', '{"b": 1}'],
            ['{"a": 3, "b": 1}', '{"k": 1}', '{"a": 3, "d": 1}'],
        ),
        ({"allOf": [A, {"additionalProperties": True}]}, ['{"a": 3, "b": 1}'], []),
        (
            {"allOf": [{"properties": {"o": A}}, {"properties": {"o": {"properties": {"b": INTEGER}}}}]},
            ['{"o": {"a": 1, "b": 2}}'],
            ['{"p": 1}'],
        ),
        # by reference
        (
            {"$ref": "#/$defs/N", "$defs": {"N": {"properties": {"next": {"$ref": "#/$defs/N"}}}}},
            ["{}", '{"next": {"next": {}}}'],
            ['{"next": {"x": 1}}', '{"x": 1}'],
        ),
        ({"properties": {"a/b": INTEGER, "c": {"$ref": "#/properties/a~1b"}}}, ['{"a/b": 1, "c": 2}'], ['{"c": ""}']),
        (
            {"allOf": [{"$ref": "#/definitions/A"}, {"properties": {"b": INTEGER}}], "definitions": {"A": A}},
            ['{"a": 1, "b": 2}'],
            ['{"a": 1, "c": 2}'],
        ),
        # counts that nothing reaches, words that constrain nothing
        ({"type": "array", "maxItems": 2**63 - 1, "uniqueItems": False, "x-order": 1e400}, ["[1, 1]"], ["3"]),
    ],
)
def test_schemas_are_read_as_their_authors_mean_them(
    schema: Any, yes: list[str], no: list[str], compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiled(compiler, json.dumps(schema).replace("Infinity", "1e400"))
    assert [text for text in yes if not accepts(matcher, tokenizer, text)] == []
    assert [text for text in no if accepts(matcher, tokenizer, text)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("true", "must be an object"),
        ("{}", "no word that constrains anything"),
        ('{"name": "x", "schema": {"type": "integer"}}', "no word that constrains anything"),
        ('{"title": "x", "$defs": {"A": {"type": "integer"}}}', "no word that constrains anything"),
        ('{"type": "integer", "minimum": NaN}', "NaN is not a number of JSON"),
        ('{"const": 1e99999999999999999999}', "out of range"),
        ('{"not": {}}', "not is not supported"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems is not supported"),
        ('{"$ref": "http://a.b/c"}', r'\$ref must point into the schema itself \(#/...\), not "http://a.b/c"'),
        ('{"$ref": "#/$defs/A"}', r'\$ref points to nothing: "#/\$defs/A"'),
        ('{"properties": []}', "properties must be an object"),
        ('{"anyOf": {}}', "anyOf must be a list"),
        ('{"items": 3}', "a schema must be an object, true or false, not 3"),
        ('{"type": "string", "minLength": 2147483648}', "minLength must be at most"),
        ('{"type": "string", "maxLength": 1.5}', "maxLength must be a whole number"),
        ('{"multipleOf": 0}', "multipleOf must be above 0"),
        ('{"multipleOf": 0.07}', "too many digits"),
        ('{"allOf": [{"multipleOf": 65521}, {"multipleOf": 65519}]}', "least common multiple of all multipleOf"),
        ('{"minimum": "1"}', 'minimum must be a number, not "1"'),
    ],
)
def test_what_cannot_be_followed_is_refused(text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        read(text)


@pytest.mark.parametrize("number", ["9007199254740992", "9007199254740993", "-18446744073709551618", "1e30", "1e-400"])
@pytest.mark.parametrize(
    "schema",
    [
        '{"const": %s}',
        '{"enum": [1, {"a": [%s]}]}',
        '{"multipleOf": %s}',
        '{"$ref": "#/$defs/A", "$defs": {"A": {"items": {"const": %s}}}}',
        '{"minimum": %s, "maximum": %s}',
        '{"properties": {"a": {"exclusiveMinimum": %s, "exclusiveMaximum": %s}}}',
    ],
)
def test_numbers_that_would_be_others_are_refused(number: str, schema: str) -> None:
    with pytest.raises(SchemaError, match="must be a number that float64 has exactly"):
        read(schema.replace("%s", number))


def test_bounds_that_no_int64_breaks_keep_numbers_within(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for least, most in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (-1e30, 1e300)):
        matcher = compiled(compiler, {"type": "integer", "minimum": least, "maximum": most})
        assert accepts(matcher, tokenizer, str(LARGEST_BOUND))
        assert not accepts(matcher, tokenizer, str(LARGEST_BOUND + 1))
        assert accepts(matcher, tokenizer, str(-LARGEST_BOUND)) == (least < 0)
        assert not accepts(matcher, tokenizer, str(-LARGEST_BOUND - 1))
    doubles = {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}
    assert accepts(compiled(compiler, doubles), tokenizer, "-0.5")


EDGES = [0, 1, 10, 999, 2**31, 2**32, 10**15, 2**53, 10**18, 2**63, 2**64, 10**22, 10**30]
numbers = st.builds(
    lambda edge, off, sign, scale: sign * (edge + off) * scale,
    st.sampled_from(EDGES).map(Decimal),
    st.sampled_from([-1024, -1, 0, 0, 1]),
    st.sampled_from([1, -1]),
    st.sampled_from([1, 1, 1, Decimal("0.01"), Decimal("1e-9")]),
)

OFFSETS = [Decimal(off) for off in ("-1000", "-1", "-0.5", "-1e-9", "0", "1e-9", "0.01", "1", "1000")]


@example(kind="integer", bounds={"exclusiveMinimum": Decimal(-LARGEST_BOUND)})
@given(
    kind=st.sampled_from(["integer", "number"]),
    bounds=st.dictionaries(
        st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "const"]), numbers, max_size=3
    ),
)
@settings(max_examples=150)
def test_numbers_are_exact_or_refused(
    kind: str, bounds: dict[str, Decimal], compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    text = "{" + ", ".join([f'"type": "{kind}"', *(f'"{word}": {value:f}' for word, value in bounds.items())]) + "}"
    try:
        matcher = compiled(compiler, text)
    except InvalidRequestError:
        return
    validator = jsonschema.Draft202012Validator({"type": kind, **bounds})
    with decimal.localcontext(prec=60):
        for value in {Decimal(0), *(value + off for value in bounds.values() for off in OFFSETS)}:
            is_whole = value == int(value)
            written = str(int(value)) if is_whole else f"{value:f}".rstrip("0")
            valid = validator.is_valid(int(value) if is_whole else value)
            accepted = accepts(matcher, tokenizer, written)
            # A bound beyond int64 may forbid more than it says, and -0.1 above -0.11 has to be written -0.10.
            is_exact = is_whole and abs(value) < 2**53
            assert accepted == valid if is_exact else accepted <= valid, (text, written)


names = st.sampled_from(["a", "b", "c d"])
scalars = st.one_of(
    st.sampled_from([{"type": "string", "maxLength": 5}, {"type": "boolean"}, {"type": "null"}, {"const": "é\n"}]),
    st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from([1, -2, 1.5, "x", None]), min_size=1)),
    st.builds(
        lambda kind, low, size: {"type": kind, "minimum": low, "exclusiveMaximum": low + size},
        st.sampled_from(["integer", "number"]),
        st.integers(-50, 50),
        st.integers(1, 1000),
    ),
)


def objects(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    required = st.lists(names, max_size=2, unique=True)
    typed = st.sampled_from([{}, {"type": "object"}])
    more = st.sampled_from([{}, {}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}])
    return st.builds(
        lambda properties, required, typed, more: {**typed, "properties": properties, "required": required, **more},
        st.dictionaries(names, schemas, max_size=3),
        required,
        typed,
        more,
    )


def deeper(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(schemas, min_size=1, max_size=2)
    return st.one_of(
        objects(schemas),
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, schemas, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, some),
        st.builds(lambda own, parts: {"allOf": parts, **own}, objects(schemas) | st.just({}), some),
        st.builds(lambda own, parts: {**own, "anyOf": parts}, objects(schemas), some),
    )


@given(schema=st.recursive(scalars, deeper, max_leaves=8), seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_whatever_follows_a_schema_is_valid(
    schema: Any, seed: int, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    referred = {
        "$defs": {"S": schema},
        "anyOf": [{"$ref": "#/$defs/S"}, {"type": "array", "items": {"$ref": "#/$defs/S"}}],
    }
    for whole in (schema, referred):
        try:
            matcher = compiled(compiler, whole)
        except InvalidRequestError:  # nothing is both
            continue
        text = walk(matcher, tokenizer, random.Random(seed))
        if text is not None:
            jsonschema.validate(json.loads(text, parse_float=Decimal), whole, jsonschema.Draft202012Validator)


def walk(matcher: Matcher, tokenizer: Tokenizer, chance: random.Random) -> str | None:
    """A text of tokens chosen by chance, the sooner ended the better; None if it does not end."""
    content = b""
    for _ in range(300):
        allowed = matcher.allowed().nonzero().flatten().tolist()
        if tokenizer.end_of_text_id in allowed:
            return content.decode()
        closing = [i for i in allowed if tokenizer.token_bytes[i] in (b'"', b"}", b"]")]
        token_id = chance.choice(closing if closing and chance.random() < 0.5 else allowed)
        content += tokenizer.token_bytes[token_id]
        matcher.observe(token_id)
    return None
