from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.sampling import SamplingParams
from server.engine.request import Request
from server.engine.scheduler import PRIORITY_SECONDS, Scheduler


def request(name: str, n_prompt: int = 4, n: int = 1, priority: int = 0) -> Request:
    return Request(name, prompt_ids=[0] * n_prompt, params=SamplingParams(n=n), priority=priority)


def names(requests: object) -> str:
    return "".join(one.request_id for one in requests)  # type: ignore[attr-defined]


def test_admission_is_by_priority_then_arrival_and_by_slots() -> None:
    scheduler = Scheduler(n_slots=3, chunk_size=8)
    for one, now in (
        (request("a", n=2), 0.0),
        (request("b", n=2), 1.0),
        (request("c"), 2.0),
        (request("d", priority=-1), 3.0),
    ):
        scheduler.add(one, now)
    assert names(scheduler.admit()) == "da"
    assert names(scheduler.admit()) == ""  # c would fit, but does not overtake b
    scheduler.free_slots(2)
    assert names(scheduler.admit()) == "b"
    scheduler.free_slots(1)
    assert names(scheduler.admit()) == "c"


def test_a_low_priority_waits_no_longer_than_its_worth() -> None:
    scheduler = Scheduler(n_slots=1, chunk_size=8)
    scheduler.add(request("low", priority=2), 0.0)
    scheduler.add(request("early"), 2 * PRIORITY_SECONDS - 0.1)
    scheduler.add(request("late"), 2 * PRIORITY_SECONDS + 0.1)
    order = []
    for _ in range(3):
        order += [one.request_id for one in scheduler.admit()]
        scheduler.free_slots(1)
    assert order == ["early", "low", "late"]


def test_prompts_take_turns() -> None:
    scheduler = Scheduler(n_slots=3, chunk_size=4)
    for one in (request("a", n_prompt=12), request("b", n_prompt=6), request("c", n_prompt=1)):
        scheduler.add(one, 0.0)
    list(scheduler.admit())
    log = []
    for _ in range(5):
        for one, end in scheduler.chunks(n_decoding=2):
            log.append((one.request_id, end))
            one.num_computed_tokens = end
            if end == one.num_prompt_tokens:
                scheduler.finish_reading(one)
    assert log == [("a", 4), ("b", 4), ("c", 1), ("a", 8), ("b", 6), ("a", 12)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 16),
    st.lists(st.integers(0, 10), min_size=1, max_size=5),
    st.integers(0, 12),
)
def test_chunks_end_at_multiples_whatever_the_load(
    prompts: list[int], chunk_size: int, decoding: list[int], cached: int
) -> None:
    scheduler = Scheduler(n_slots=10, chunk_size=chunk_size)
    requests = [request(f"{i}", n_prompt=n) for i, n in enumerate(prompts)]
    for one in requests:
        one.num_computed_tokens = min(cached, one.num_prompt_tokens - 1)
        scheduler.add(one, 0.0)
    list(scheduler.admit())
    for step in range(1000):
        n_decoding, tokens = decoding[step % len(decoding)], 0
        for one, end in list(scheduler.chunks(n_decoding)):
            assert end % chunk_size == 0 or end == one.num_prompt_tokens
            assert 0 < end - one.num_computed_tokens <= chunk_size
            tokens += end - one.num_computed_tokens
            one.num_computed_tokens = end
            if end == one.num_prompt_tokens:
                scheduler.finish_reading(one)
        assert 0 < tokens <= 10 + chunk_size - n_decoding
        if not scheduler.num_reading:
            return
    raise AssertionError("prompts were not read")


def test_removing_frees_the_slots_of_those_that_had_some() -> None:
    scheduler = Scheduler(n_slots=2, chunk_size=4)
    a, b, c = (request(name) for name in "abc")
    for one in (a, b, c):
        scheduler.add(one, 0.0)
    list(scheduler.admit())
    assert (scheduler.n_free_slots, scheduler.num_reading, scheduler.num_waiting) == (0, 2, 1)
    assert names(scheduler.requests()) == "cab"
    scheduler.remove([a, c])
    assert names(scheduler.requests()) == "b"
    assert (scheduler.n_free_slots, scheduler.num_reading, scheduler.num_waiting) == (1, 1, 0)
