from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from model import Tokenizer
from server.engine import AsyncEngine, LLMEngine, Request
from server.errors import GenerationError, OverloadedError, ShuttingDownError
from tests.conftest import random_model, tiny_config


@contextmanager
def running(tokenizer: Tokenizer, **options: int) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(LLMEngine(random_model(tiny_config()), tokenizer, **options))
    engine.start()
    yield engine
    if engine.is_running:
        engine.stop()


def request(name: str, max_new_tokens: int = 5) -> Request:
    return Request(name, prompt_ids=[1, 10, 11], max_new_tokens=max_new_tokens)


async def ids(outputs: AsyncIterator[object]) -> list[int]:
    return [output.token_id async for output in outputs]  # type: ignore[attr-defined]


def test_many_requests_at_once(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        results = await asyncio.gather(*(ids(engine.generate(request(f"{i}"))) for i in range(10)))
        assert len(results[0]) == 5
        assert all(result == results[0] for result in results)

    with running(tokenizer, max_num_seqs=4) as engine:
        asyncio.run(main(engine))


def test_closing_the_iterator_aborts(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        outputs = engine.generate(request("endless", max_new_tokens=10**9))
        await anext(outputs)
        await outputs.aclose()  # type: ignore[attr-defined]
        assert len(await ids(engine.generate(request("next")))) == 5

    with running(tokenizer, max_num_seqs=1) as engine:
        asyncio.run(main(engine))
        assert not engine.engine.has_work


def test_a_refusal_reaches_the_caller(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(OverloadedError):
            await ids(engine.generate(request("a")))

    with running(tokenizer, max_queue_length=0) as engine:
        asyncio.run(main(engine))


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with (
            mock.patch.object(engine.engine, "step", side_effect=RuntimeError("broken")),
            pytest.raises(GenerationError, match=r"^Generation failed in the server\.$"),
        ):
            await ids(engine.generate(request("a")))
        assert len(await ids(engine.generate(request("b")))) == 5

    with running(tokenizer) as engine:
        asyncio.run(main(engine))


def test_stopping_ends_what_runs_and_refuses_more(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        outputs = engine.generate(request("endless", max_new_tokens=10**9))
        await anext(outputs)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ShuttingDownError):
            await ids(outputs)
        with pytest.raises(ShuttingDownError):
            await ids(engine.generate(request("late")))

    with running(tokenizer) as engine:
        asyncio.run(main(engine))
