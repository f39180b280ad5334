"""Attacks by requests that are well formed: grammars, widths, lengths."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from benchmarks.hostile.attacker import (
    REFUSED,
    Attacker,
    WeaknessError,
    attack,
    outcome,
    several,
)
from benchmarks.hostile.words import words

# Grammars


def nested_schema(n: int) -> dict[str, Any]:
    """Each definition has the next one twice."""
    definitions: dict[str, Any] = {}
    for i in range(n):
        reference = {"$ref": f"#/$defs/d{i + 1}"}
        definitions[f"d{i}"] = {"type": "object", "properties": {"a": reference, "b": reference}}
    return {"$defs": {**definitions, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}


EXPLOSIVE: list[dict[str, Any]] = [
    *({"regex": value} for value in ("(a{0,1000}){0,1000}", "(x+x+)+y", "(a|b)*a(a|b){30}", "((a{9}){9}){9}" * 50)),
    {"regex": "|".join(f"w{i}" for i in range(6000))},
    {"choice": [f"choice {i}" for i in range(3000)]},
    {"json": nested_schema(40)},
    {"json": {"type": "array", "items": {"type": "string", "pattern": "(a|b)*a(a|b){20}"}, "minItems": 5000}},
    {"json": {"type": "string", "minLength": 50_000, "maxLength": 60_000}},
    {"json": {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "number"}}} for i in range(900)]}},
]
REFUSABLE = [r"(?=a)abc", "[", r"(a)\1", "(?P<a>x)(?P=a)", "a{5,2}", "*", "\\", r"\p{Nope}", "(" * 5000]
PRIMES = (2147483647, 2147483629, 2147483587, 1999999973, 1999999943, 1999999927, 1999999913, 1999999873)
EDGES = (2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 2**53 + 1, 10**22 + 1, 10**40, -(10**30))


@attack
async def grammar_explosive(self: Attacker) -> str:
    chosen = self.chance.sample(EXPLOSIVE, 3)
    return await several(*(self.complete(structured_outputs=grammar, max_tokens=20) for grammar in chosen))


@attack
async def grammar_slow(self: Attacker) -> str:
    schemas = [{"type": "integer", "multipleOf": prime, "minimum": self.chance.randrange(9)} for prime in PRIMES]
    return await several(*(self.complete(structured_outputs={"json": schema}) for schema in schemas))


@attack
async def grammar_of_large_numbers(self: Attacker) -> str:
    number = self.chance.choice(EDGES)
    schemas: list[dict[str, Any]] = [
        {"type": "integer", "minimum": number, "maximum": number},
        {"type": "integer", "minimum": number - 1, "maximum": number + 1},
        {"const": number},
        {"enum": [number, number + 1]},
    ]

    async def one(schema: dict[str, Any]) -> str:
        body = {"prompt": "One day", "max_tokens": 60, "structured_outputs": {"json": schema}, "temperature": 0}
        response = await self.ask("POST", "/v1/completions", json=body)
        if response is not None and response.status_code == 200:
            text = response.json()["choices"][0]["text"]
            with suppress(ValueError):
                if abs(json.loads(text) - number) > 1:
                    raise WeaknessError(f"{schema} gave {text}")
        return outcome(response)

    return await several(*(one(schema) for schema in schemas))


@attack
async def grammar_of_bad_expressions(self: Attacker) -> str:
    async def one(regex: str) -> str:
        parameters = {"max_new_tokens": 2, "grammar": {"type": "regex", "value": regex}}
        return await self.post("/generate", {"inputs": "One day", "parameters": parameters}, REFUSED)

    return await several(*(one(regex) for regex in REFUSABLE))


# Wide requests


@attack
async def wide_by_n(self: Attacker) -> str:
    """With streams that do not end by themselves, so that its slots are never free at once."""
    endless = {"prompt": "One day", "max_tokens": 900_000, "ignore_eos": True}
    async with self.stream("/v1/completions", endless), self.stream("/v1/completions", endless):
        with suppress(TimeoutError):
            async with asyncio.timeout(15):
                return await self.complete(n=32, priority=-1000, max_tokens=16)
    return "waited"


@attack
async def wide_by_length(self: Attacker) -> str:
    with suppress(TimeoutError):
        async with asyncio.timeout(10):
            return await self.complete(n=16, max_tokens=900_000, ignore_eos=True, logprobs=20)
    return "left"


@attack
async def wide_by_logprobs(self: Attacker) -> str:
    return await self.complete(max_tokens=2000, ignore_eos=True, logprobs=20)


ALLOWED_IDS = json.dumps(
    {"prompt": "One day", "max_tokens": 1, "n": 31, "allowed_token_ids": [5] * 1_300_000}, separators=(",", ":")
).encode()


@attack
async def wide_by_allowed_ids(self: Attacker) -> str:
    return await self.post("/v1/completions", ALLOWED_IDS)


@attack
async def wide_by_biases(self: Attacker) -> str:
    biases = {str(i): 1.0 for i in range(self.chance.choice([2048, 65_536, 270_000]))}
    return await self.complete(logit_bias=biases, n=31, max_tokens=2)


@attack
async def wide_by_prompts(self: Attacker) -> str:
    prompts = [words(self.chance.getrandbits(32), 20) for _ in range(48)]
    return await self.complete(prompt=prompts, logit_bias={str(i): 1.0 for i in range(2048)}, max_tokens=1)


@attack
async def wide_by_stop_strings(self: Attacker) -> str:
    return await self.complete(stop=["ab" * 127 + f"{i:02}" for i in range(16)], n=31, max_tokens=200)


@attack
async def requests_many(self: Attacker) -> str:
    """Three times as many as may wait."""
    urgent = [self.complete(prompt=words(i, 50), max_tokens=8, priority=-1000) for i in range(200)]
    return await several(*urgent)


# Long texts


@attack
async def tokenize_long(self: Attacker) -> str:
    route = self.chance.choice(["inputs", "prompt"])
    return await several(*(self.post("/tokenize", {route: "a b " * 1_000_000}) for _ in range(4)))


@attack
async def tokenize_many(self: Attacker) -> str:
    return await several(*(self.post("/tokenize", {"prompt": "a b " * 10_000}) for _ in range(60)))


@attack
async def detokenize_long(self: Attacker) -> str:
    return await self.post("/detokenize", {"tokens": [5] * 1_300_000})


@attack
async def prompt_long(self: Attacker) -> str:
    return await several(*(self.complete(prompt="a b " * 1_000_000, max_tokens=1) for _ in range(2)))


@attack
async def prompt_of_ids(self: Attacker) -> str:
    ids = [self.chance.randrange(3, 2000) for _ in range(20_000)]
    return await self.complete(prompt=ids, max_tokens=1, repetition_penalty=1.5)
