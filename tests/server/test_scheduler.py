from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.sampling import SamplingParams
from server.engine.request import Request
from server.engine.scheduler import PRIORITY_SECONDS, Scheduler


def request(name: str, n_prompt: int = 4, n: int = 1, priority: int = 0, owner: str = "") -> Request:
    return Request(name, prompt_ids=[0] * n_prompt, params=SamplingParams(n=n), priority=priority, owner=owner)


def names(requests: object) -> str:
    return "".join(one.request_id for one in requests)  # type: ignore[attr-defined]


def admitted(scheduler: Scheduler) -> str:
    """Who gets slots now, and has read the prompt at once."""
    got = ""
    while started := list(scheduler.admit()):
        got += names(started)
        for one in {one for one in started if one.admitted_at is None}:
            one.admitted_at = 0.0
            scheduler.finish_reading(one)
    return got


def test_admission_is_by_priority_then_arrival_and_one_slot_at_a_time() -> None:
    scheduler = Scheduler(n_slots=3, chunk_size=8)
    a, b, c, d = request("a", n=2), request("b", n=2), request("c"), request("d", priority=-1)
    for now, one in enumerate((a, b, c, d)):
        scheduler.add(one, float(now))
    assert scheduler.num_waiting == 4
    assert names(scheduler.admit()) == "dab"  # a slot to read in for each
    for one in (d, a, b):
        scheduler.finish_reading(one)
    assert names(scheduler.admit()) == ""
    order = ""
    for one in (d, a, b):
        scheduler.free_slot(one)
        order += names(scheduler.admit())
    assert order == "abc"
    assert names(scheduler.requests()) == "c"
    assert scheduler.num_waiting == 0


def test_a_low_priority_waits_no_longer_than_its_worth() -> None:
    scheduler = Scheduler(n_slots=1, chunk_size=8)
    scheduler.add(request("low", priority=2), 0.0)
    scheduler.add(request("early"), 2 * PRIORITY_SECONDS - 0.1)
    scheduler.add(request("late"), 2 * PRIORITY_SECONDS + 0.1)
    order = []
    for _ in range(3):
        (one,) = scheduler.admit()
        order.append(one.request_id)
        scheduler.remove([one])
    assert order == ["early", "low", "late"]


def test_priority_has_no_say_among_owners() -> None:
    scheduler = Scheduler(n_slots=1, chunk_size=8)
    scheduler.add(request("a", owner="A"), 0.0)
    scheduler.add(request("b", owner="B", priority=-1000), 1.0)
    scheduler.add(request("c", owner="B", priority=-1001), 2.0)
    order = ""
    for _ in range(3):
        (one,) = scheduler.admit()
        order += one.request_id
        scheduler.remove([one])
    assert order == "acb"


def test_an_owner_leaves_slots_to_those_who_come_later() -> None:
    scheduler = Scheduler(n_slots=4, chunk_size=8)
    scheduler.max_slots_per_owner = 3
    scheduler.add(request("a", n=4, owner="A"), 0.0)
    assert admitted(scheduler) == "aaa"
    scheduler.add(request("b", owner="B"), 1.0)
    assert admitted(scheduler) == "b"


def test_a_wide_request_and_an_endless_text_hold_up_nobody() -> None:
    scheduler = Scheduler(n_slots=4, chunk_size=8)
    endless, wide, small = request("e"), request("w", n=4), request("s")
    scheduler.add(endless, 0.0)
    assert admitted(scheduler) == "e"
    scheduler.add(wide, 1.0)
    scheduler.add(small, 2.0)
    assert admitted(scheduler) == "wsw"  # while the wide one reads its prompt, the small one starts
    scheduler.free_slot(wide)
    assert admitted(scheduler) == "w"


@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.data(),
)
def test_no_slot_idles_and_nobody_starves(
    wanted: list[tuple[str, int]], n_slots: int, most: int, data: st.DataObject
) -> None:
    """Whatever ends first, a free slot goes to who uses the fewest, and an owner's requests start in their order."""
    scheduler = Scheduler(n_slots=n_slots, chunk_size=8)
    scheduler.max_slots_per_owner = most
    requests = [request(f"{i}", n=n, owner=owner) for i, (owner, n) in enumerate(wanted)]
    for now, one in enumerate(requests):
        scheduler.add(one, float(now))
    started: list[Request] = []
    running: list[Request] = []
    for _ in range(sum(n for _, n in wanted) + 1):
        for one in scheduler.admit():
            if one not in started:
                scheduler.finish_reading(one)
                assert all(other in started for other in requests[: requests.index(one)] if other.owner == one.owner)
            started.append(one)
            running.append(one)
        used = {owner: sum(one.owner == owner for one in running) for owner in "ABC"}
        waiting = {one.owner for one in scheduler.requests()}
        assert max(used.values()) <= most
        assert len(running) == n_slots or all(used[owner] == most for owner in waiting)
        if not running:
            break
        ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
        scheduler.free_slot(ended)
        fewest = min((used[owner] - (owner == ended.owner) for owner in waiting), default=None)
        if waiting and fewest is not None and fewest < most:
            (next_one,) = (one for one in [next(iter(scheduler.admit()))])
            assert used[next_one.owner] - (next_one.owner == ended.owner) == fewest
            if next_one not in started:
                scheduler.finish_reading(next_one)
            started.append(next_one)
            running.append(next_one)
    assert sorted(one.request_id for one in started) == sorted(
        one.request_id for one in requests for _ in range(one.params.n)
    )
    assert scheduler.is_empty
    assert scheduler.n_free_slots == n_slots


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
    a, b, c = request("a"), request("b", n=2), request("c")
    for one in (a, b, c):
        scheduler.add(one, 0.0)
    list(scheduler.admit())
    assert (scheduler.n_free_slots, scheduler.num_reading, scheduler.num_waiting) == (0, 2, 1)
    assert names(scheduler.requests()) == "cab"
    scheduler.remove([a, c])
    assert names(scheduler.requests()) == "b"
    assert (scheduler.n_free_slots, scheduler.num_reading, scheduler.num_waiting) == (1, 1, 0)
