"""Attacks on what belongs to others, and by files of sessions."""

from __future__ import annotations

import asyncio

from benchmarks.hostile.attacker import (
    BUSY,
    REFUSED,
    SERVED,
    Attacker,
    LeakError,
    attack,
    outcome,
    several,
)
from benchmarks.hostile.files import crafted

# Sessions


@attack
async def import_of_crafted_files(self: Attacker) -> str:
    good = await self.own_file()
    return await several(*(self.import_(name, content) for name, content in crafted(good, self.chance)))


@attack
async def import_of_damaged_files(self: Attacker) -> str:
    good = await self.own_file()

    def damaged() -> bytes:
        broken = bytearray(good)
        for _ in range(self.chance.randint(1, 4)):
            broken[self.chance.randrange(len(broken))] ^= self.chance.randint(1, 255)
        return bytes(broken[: self.chance.choice([len(broken), self.chance.randrange(len(broken))])])

    return await several(*(self.import_("damaged", damaged()) for _ in range(10)))


@attack
async def sessions_many(self: Attacker) -> str:
    """Until there is no room for more; then all of them are deleted."""
    made = await self.ask("POST", "/sessions")
    if made is None or made.status_code != 201:
        return outcome(made)
    name = made.json()["session_id"]
    await self.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}, "session_id": name})
    found = await several(*(self.post(f"/sessions/{name}/fork", {"n": 64}) for _ in range(8)))
    for card in await self.own_sessions():
        await self.ask("DELETE", f"/sessions/{card['session_id']}")
    return found


# Keys

CLOSED = ["/generate", "/v1/completions", "/v1/models", "/sessions", "/tokenize", "/info", "/tokenizer_info"]
AUTHORIZATIONS = [
    "",
    "Bearer",
    "Bearer ",
    "bearer x",
    "Basic eDp5",
    "Bearer a b",
    "Bearer " + "k" * 5000,
    "Bearer \xff",
]


@attack
async def keys_wrong(self: Attacker) -> str:
    async def one(path: str, authorization: str) -> str:
        headers = {"Authorization": authorization.encode("latin-1")}
        response = await self.ask("POST", path, allowed=frozenset({401, 400, 431}), json={}, headers=headers)
        return outcome(response)

    tried = [(self.chance.choice(CLOSED), self.chance.choice(AUTHORIZATIONS)) for _ in range(20)]
    return await several(*(one(path, authorization) for path, authorization in tried))


@attack
async def sessions_of_others(self: Attacker) -> str:
    """Of a session that is used at this time: it does not exist, whatever is asked."""
    if not self.sessions:
        return "none known"
    name, absent = self.sessions[-1], frozenset({404})
    body = {"parameters": {"max_new_tokens": 1}, "session_id": name}
    asked = [
        self.ask("POST", "/generate", allowed=SERVED | REFUSED | {409}, json={"inputs": "x", **body}),
        self.ask("GET", f"/sessions/{name}"),
        self.ask("DELETE", f"/sessions/{name}"),
        self.ask("GET", f"/sessions/{name}/export"),
        self.ask("POST", f"/sessions/{name}/fork", json={"n": 1}),
        self.ask("POST", "/v1/completions", allowed=SERVED | REFUSED | {409}, json={"prompt": "x", "session_id": name}),
    ]
    answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
    for answer in answers:
        if answer.status_code not in absent | BUSY:
            raise LeakError(
                f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text:.200}"
            )
    listed = await self.ask("GET", "/sessions")
    if listed is not None and name in listed.text:
        raise LeakError("another key's session is in the list")
    return " ".join(sorted({outcome(answer) for answer in answers}))


@attack
async def prompts_of_others(self: Attacker) -> str:
    """Is what another key has just sent in the cache for this one?"""
    if not self.secrets:
        return "none known"
    response = await self.ask("POST", "/v1/completions", json={"prompt": self.secrets.pop(), "max_tokens": 1})
    if response is not None and response.status_code == 200:
        details = response.json()["usage"].get("prompt_tokens_details") or {}
        if cached := details.get("cached_tokens"):
            raise LeakError(f"{cached} tokens of another key's prompt are cached")
    return outcome(response)
