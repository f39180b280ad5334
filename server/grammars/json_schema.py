"""JSON schemas as their authors mean them, in words that llguidance follows exactly.

- Who names properties means an object, who names items means an array, with or without `type`.
- An object that declares properties has no others, unless the schema says something of others. Of schemas that are put
  together (allOf, $ref, anyOf, oneOf) each may have what another one declares.
- Numbers are exact or refused. llguidance reads them as float64 and writes bounds as regular expressions over int64:
  beyond 2^53 it writes other numbers, and beyond 2^63 it recurses until its process dies.
- Words that nothing here can follow are refused, those that constrain nothing are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from functools import reduce
from itertools import chain
from math import lcm
from operator import or_
from typing import Any, NamedTuple
from urllib.parse import unquote

OBJECT_WORDS = ("properties", "patternProperties", "additionalProperties", "required")
ARRAY_WORDS = ("items", "prefixItems")
OF_OTHERS = ("additionalProperties", "patternProperties")  # what an author says of others
UNIONS = ("anyOf", "oneOf")
PARTS = ("allOf", "$ref", *UNIONS)  # schemas that hold in the same place
MAPS = ("properties", "patternProperties")  # of a name to a schema
NESTED = ("items", "additionalItems", "additionalProperties")  # a schema, or, of items, a list of them
LISTS = ("prefixItems", "allOf", *UNIONS)
LOWER = ("minimum", "exclusiveMinimum")
UPPER = ("maximum", "exclusiveMaximum")
LEAST = ("minLength", "minItems", "minProperties")
MOST = ("maxLength", "maxItems", "maxProperties")
COPIED = ("type", "required", "pattern", "format")
FOLLOWED = frozenset(
    {"$ref", "const", "enum", "multipleOf", *MAPS, *NESTED, *LISTS, *LOWER, *UPPER, *LEAST, *MOST, *COPIED}
)
# What would have no effect is refused, but for the values that ask for none.
WITHOUT_EFFECT = {"uniqueItems": False, "unevaluatedProperties": False, "minContains": 0}
REFUSED = frozenset(
    {
        *("not", "if", "then", "else", "contains", "maxContains", "propertyNames", "unevaluatedItems"),
        *("dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef", *WITHOUT_EFFECT),
    }
)

EXACT = 2**53  # whole numbers of smaller magnitude, and those one off, are exact in float64
LARGEST_BOUND = 2**63 - 1024  # the largest float64 that is an int64
LARGEST_COUNT = 2**31 - 1  # nothing has more tokens
LARGEST_STEP = 2**32 - 1
LARGEST_COMMON_STEP = 2**16 - 1  # the product of two is below 2^32, where llguidance's least common multiple wraps

Names = frozenset[str]
NONE: Names = frozenset()


class SchemaError(ValueError):
    """What a schema has that cannot be followed: a clause, to stand after the schema's name and a colon."""


def read(text: str) -> str:
    """A schema, as JSON, for llguidance. Raises SchemaError."""
    try:
        schema = json.loads(text, parse_float=_decimal, parse_constant=_decimal)
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error)) from error
    if not isinstance(schema, dict):
        raise SchemaError("it must be an object")
    if not schema.keys() & (FOLLOWED | REFUSED):
        raise SchemaError("it has no word that constrains anything: type, properties, enum, anyOf, say")
    try:
        return json.dumps(_Reader(schema).read_all())
    except RecursionError as error:
        raise SchemaError("it is nested too deeply") from error


def expression(text: str) -> str:
    """A regular expression as it is. Raises SchemaError for a backslash at its end, which llguidance leaves out."""
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise SchemaError(f"{_shown(text)} ends with a lone backslash")
    return text


def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation as error:
        raise SchemaError(f"the number {text[:40]} is out of range") from error
    if not number.is_finite():
        raise SchemaError(f"{text} is not a number of JSON")
    return number


class _Declared(NamedTuple):
    """What the objects of a schema may have: names, whether any is a property's, and whether others are asked for."""

    names: Names = NONE
    has_properties: bool = False
    allows_others: bool = False

    def __or__(self, other: _Declared) -> _Declared:
        return _Declared(
            self.names | other.names,
            self.has_properties or other.has_properties,
            self.allows_others or other.allows_others,
        )


class _Reader:
    """A schema put down again. What a $ref names is put down once for each way in which it is read."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._defs: dict[str, Any] = {}
        self._known: dict[tuple[str, Names | None, Names | None], str] = {}
        self._declared_by: dict[str, _Declared] = {}  # by $ref
        self._steps: list[Decimal] = []
        self._has_parts = False

    def read_all(self) -> dict[str, Any]:
        schema = self._read(self._root, NONE, NONE)
        assert isinstance(schema, dict)
        self._check_steps()
        draft = {"$schema": self._root["$schema"]} if "$schema" in self._root else {}
        return {**draft, **schema, "$defs": self._defs}

    def _read(self, schema: Any, others: Names | None, shared: Names | None) -> Any:
        """A schema that stands at one place.

        others: what an object here may have beside what the schema declares; None for anything, if something else
        closes it, or nothing does. shared: the properties that other schemas for the same object declare as well, and
        whose own objects therefore stay open; None for all, however deep.
        """
        if isinstance(schema, bool):
            return self._read({}, others, shared) if schema and others else schema
        if not isinstance(schema, dict):
            raise SchemaError(f"a schema must be an object, true or false, not {_shown(schema)}")
        _check_words(schema)
        parts = {word: self._declared_in(word, schema[word]) for word in PARTS if word in schema}
        of_parts, closed = self._close(schema, parts, others)
        if shared is not None and parts:
            own = Counter(name for part in (_own(schema), *chain(*parts.values())) for name in part.names)
            shared |= frozenset(name for name, n in own.items() if n > 1)
        read: dict[str, Any] = dict(_type(schema))
        for word, value in schema.items():
            if word in PARTS:
                read[word] = self._part(word, value, of_parts.get(word), shared)
            elif word in FOLLOWED:
                read.update(self._word(word, value, shared))
        if closed is None:
            return read
        own = {} if parts else read.get("properties", {})
        properties = own | dict.fromkeys(sorted(closed - own.keys()), True)
        close = {"properties": properties, "additionalProperties": False}
        # After the parts, not among them: the first that declares a property gives it its place in the text.
        return {"allOf": [read, close]} if parts else {**read, **close}

    def _close(
        self, schema: dict[str, Any], parts: dict[str, list[_Declared]], others: Names | None
    ) -> tuple[dict[str, Names], Names | None]:
        """Where no others are allowed: in the schemas of one word, beside these, or here, where these are all."""
        if others is None or any(word in schema for word in OF_OTHERS):
            return {}, None
        one = next((word for word in UNIONS if word in parts), None)
        if one is None and "properties" not in schema and [len(declared) for declared in parts.values()] == [1]:
            (one,) = parts
        outside = reduce(or_, chain(*(found for word, found in parts.items() if word != one)), _own(schema))
        if outside.allows_others:
            return {}, None
        names = outside.names | others
        if one is not None:
            return {one: names}, None
        return {}, names if outside.has_properties or others else None

    def _declared(self, schema: Any) -> _Declared:
        if not isinstance(schema, dict):
            return _Declared()
        parts = (self._declared_in(word, schema[word]) for word in PARTS if word in schema)
        return reduce(or_, chain(*parts), _own(schema))

    def _declared_in(self, word: str, value: Any) -> list[_Declared]:
        """By each of the schemas that hold together: a union is one."""
        if word == "$ref":
            pointer = _string(word, value)
            if pointer not in self._declared_by:
                self._declared_by[pointer] = _Declared()  # if it leads back here, nothing can match it
                self._declared_by[pointer] = self._declared(self._target(pointer))
            return [self._declared_by[pointer]]
        each = [self._declared(part) for part in _list(word, value)]
        return each if word == "allOf" else [reduce(or_, each, _Declared())]

    def _part(self, word: str, value: Any, others: Names | None, shared: Names | None) -> Any:
        self._has_parts = True
        if word != "$ref":
            return [self._read(part, others, shared) for part in _list(word, value)]
        key = value, others, shared
        if key not in self._known:
            name = self._known[key] = str(len(self._known))
            self._defs[name] = self._read(self._target(value), others, shared)
        return f"#/$defs/{self._known[key]}"

    def _target(self, pointer: str) -> Any:
        if not pointer.startswith("#") or pointer[1:2] not in ("", "/"):
            raise SchemaError(f"$ref must point into the schema itself (#/...), not {_shown(pointer)}")
        found: Any = self._root
        for step in pointer[1:].split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and len(name) < 9 and int(name) < len(found):
                found = found[int(name)]
            elif name:  # "#/" is the schema itself to some
                raise SchemaError(f"$ref points to nothing: {_shown(pointer)}")
        return found

    def _word(self, word: str, value: Any, shared: Names | None) -> Mapping[str, Any]:
        if word == "pattern":
            return {word: expression(_string(word, value))}
        if word in MAPS:
            parts = _dict(word, value).items()
            for name in value if word == "patternProperties" else ():
                expression(name)
            return {word: {name: self._within(part, name, shared) for name, part in parts}}
        if word in NESTED or word in LISTS:
            is_list = word in LISTS or (word == "items" and isinstance(value, list))
            within = [self._within(part, None, shared) for part in (_list(word, value) if is_list else [value])]
            return {word: within if is_list else within[0]}
        if word in ("const", "enum"):
            return {word: _exact_value(word, value)}
        if word in (*LOWER, *UPPER) and not isinstance(value, bool):  # true and false are draft 4's
            return {word: _bound(word, value)}
        if word in (*LEAST, *MOST):
            return _count(word, value)
        if word == "multipleOf":
            self._steps.append(_step(value))
            return {word: _exact(word, value)}
        return {word: value}

    def _within(self, schema: Any, name: str | None, shared: Names | None) -> Any:
        """A schema of what is in an object or a list."""
        if shared is None or name in shared:
            return self._read(schema, None, None)
        return self._read(schema, NONE, NONE)

    def _check_steps(self) -> None:
        if not self._steps:
            return
        unit = min(_unit(step) for step in self._steps)
        steps = [int(step / unit) for step in self._steps]
        largest, common = (LARGEST_COMMON_STEP, lcm(*steps)) if self._has_parts else (LARGEST_STEP, max(steps))
        if common > largest:
            together = "the least common multiple of all multipleOf" if self._has_parts else "multipleOf"
            raise SchemaError(f"{together} must be at most {largest:,} times its last digit's unit, {unit:f}")


def _type(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The type that a schema means and does not say."""
    kinds = [kind for kind, words in (("object", OBJECT_WORDS), ("array", ARRAY_WORDS)) if schema.keys() & {*words}]
    if "type" not in schema and len(kinds) == 1:
        yield "type", kinds[0]


def _check_words(schema: dict[str, Any]) -> None:
    for word in schema.keys() & REFUSED:
        if word not in WITHOUT_EFFECT or schema[word] != WITHOUT_EFFECT[word]:
            raise SchemaError(f"{word} is not supported")


def _own(schema: dict[str, Any]) -> _Declared:
    """What a schema declares without its parts. A property that is required and not declared may be anything."""
    properties, required = _dict("properties", schema.get("properties", {})), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError(f"required must be a list of names, not {_shown(required)}")
    others = schema.get("additionalProperties", False) is not False or "patternProperties" in schema
    return _Declared(frozenset([*properties, *required]), "properties" in schema, others)


def _dict(word: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{word} must be an object, not {_shown(value)}")
    return value


def _string(word: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SchemaError(f"{word} must be a string, not {_shown(value)}")
    return value


def _list(word: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError(f"{word} must be a list, not {_shown(value)}")
    return value


def _number(word: str, value: Any) -> int | Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise SchemaError(f"{word} must be a number, not {_shown(value)}")
    return value


def _exact(word: str, value: Any) -> int | float:
    """Raises SchemaError for a number that float64 does not have."""
    number = Decimal(_number(word, value))
    if abs(number) < EXACT and number == Decimal(repr(float(number))):
        return int(number) if number == int(number) else float(number)
    raise SchemaError(f"{word} must be a number that float64 has exactly, of magnitude below 2^53, not {_shown(value)}")


def _exact_value(word: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_exact_value(word, item) for item in value]
    if isinstance(value, dict):
        return {name: _exact_value(word, item) for name, item in value.items()}
    return _exact(word, value) if isinstance(value, Decimal) or type(value) is int else value


def _bound(word: str, value: Any) -> int | float:
    """A bound that no int64 can break keeps numbers within int64."""
    number = _number(word, value)
    if word in LOWER and number < -LARGEST_BOUND:
        return -LARGEST_BOUND
    if word in UPPER and number > LARGEST_BOUND:
        return LARGEST_BOUND
    return _exact(word, value)


def _count(word: str, value: Any) -> Mapping[str, int]:
    number = _number(word, value)
    if number < 0 or (number <= LARGEST_COUNT and number != int(number)):
        raise SchemaError(f"{word} must be a whole number from 0 on, not {_shown(value)}")
    if number <= LARGEST_COUNT:
        return {word: int(number)}
    if word in LEAST:
        raise SchemaError(f"{word} must be at most 2^31 - 1, not {_shown(value)}")
    return {}


def _step(value: Any) -> Decimal:
    """As llguidance takes it apart, which must give the same number. Raises SchemaError."""
    number = Decimal(repr(_exact("multipleOf", value)))
    if number <= 0:
        raise SchemaError(f"multipleOf must be above 0, not {_shown(value)}")
    digits, whole = 0, float(number)
    while whole != int(whole):
        digits, whole = digits + 1, whole * 10
    if Decimal(whole).scaleb(-digits) != number or whole > LARGEST_STEP:
        raise SchemaError(f"multipleOf has too many digits to be exact: {_shown(value)}")
    return number


def _unit(number: Decimal) -> Decimal:
    """Of its last digit that is not 0, or 1."""
    exponent = number.normalize().as_tuple().exponent
    assert isinstance(exponent, int)  # it is finite
    return Decimal((0, (1,), min(0, exponent)))


def _shown(value: Any) -> str:
    shown = str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
