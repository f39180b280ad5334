"""What pages of others may not do with a server on their reader's machine or network."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.contracts import Contracts
from server.errors import ForbiddenError

READING = frozenset({"GET", "HEAD", "OPTIONS"})
# Of these nobody can buy a name in DNS that every browser finds.
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")


class Hosts:
    """Refuses requests by a name that is not the server's: a page whose own name was made to point here sends that.

    Names without a dot, local ones and addresses cannot be made to. Clients that are no browsers may send none.
    """

    def __init__(self, app: ASGIApp, contracts: Contracts, allowed: Sequence[str]) -> None:
        self.app, self.contracts = app, contracts
        self.allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host") if scope["type"] == "http" else None
        if host is None or self._allows(host.decode("latin-1")):
            await self.app(scope, receive, send)
            return
        error = ForbiddenError(
            f"The server does not go by the name {host.decode('latin-1')[:100]!r}; --allowed-hosts gives it names."
        )
        await self.contracts.error_response(error, scope["path"])(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name = name_of(host)
        return name is not None and (name in self.allowed or "*" in self.allowed or is_local(name))


class Origins:
    """Refuses what pages of another origin ask for, but for reading, which CORS rules, and for `allowed` origins.

    As Go's http.CrossOriginProtection: Sec-Fetch-Site tells, or else the Origin beside the Host. Who sends neither is
    no browser.
    """

    def __init__(self, app: ASGIApp, contracts: Contracts, allowed: Sequence[str]) -> None:
        self.app, self.contracts, self.allowed = app, contracts, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READING or self._allows(scope):
            await self.app(scope, receive, send)
            return
        error = ForbiddenError("Pages of another origin may not ask for this; --cors-origins allows them.")
        await self.contracts.error_response(error, scope["path"])(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if "*" in self.allowed or origin in self.allowed:
            return True
        if site is not None:
            return site in ("same-origin", "none")
        return origin is None or _authority(origin) == headers.get(b"host", "").lower()


def name_of(host: str) -> str | None:
    """The name or address in a Host header, in small letters; None for what is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def is_local(name: str) -> bool:
    """Whether it is an address, or a name that is not found in public DNS."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(LOCAL_SUFFIXES)
    return True


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
