"""Going on from what a text left behind, in memory and from a file."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from model import SentencePieceTokenizer
from model.generate import generate
from model.sampling import SamplingParams
from server.engine import EngineConfig, LLMEngine, Request, RequestOutput
from server.engine.conversation import Conversation
from server.engine.snapshot import _checksum
from server.errors import GenerationError, InvalidConversationError, InvalidRequestError
from tests.conftest import STORIES, VARIANTS, Variant, random_model, tiny_config

WORDS = SentencePieceTokenizer.train(STORIES * 3, vocab_size=400)
MODELS = {variant: random_model(tiny_config(variant)) for variant in VARIANTS}
N_CORRUPTED = 1000


def make_engine(variant: Variant = "conv", **options: Any) -> LLMEngine:
    return LLMEngine(MODELS[variant], WORDS, EngineConfig(**{"max_num_seqs": 4, "chunk_size": 4, **options}))


def turn(
    engine: LLMEngine, ids: list[int], start: Conversation | None = None, **params: Any
) -> tuple[list[int], Conversation]:
    """The ids of a text, and what it leaves behind."""
    prompt_ids = [*start.unread_ids, *ids] if start else ids
    given = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params})
    engine.add_request(Request("a", prompt_ids, given, start=start, keep_conversation=True))
    text: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            text += [output.token.token_id] if output.token else []
            last = output
    assert last.conversation is not None
    return text, last.conversation


GREEDY_TURN = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def finish(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def written(engine: LLMEngine, conversation: Conversation) -> bytes:
    return engine.state_files.write(conversation.snapshot, conversation.unread_ids)


def read(engine: LLMEngine, data: bytes) -> Conversation:
    return Conversation(*engine.state_files.read(data))


@settings(max_examples=25)
@given(
    variant=st.sampled_from(VARIANTS),
    turns=st.lists(st.tuples(st.lists(st.integers(2, 399), max_size=9), st.integers(0, 6)), min_size=1, max_size=6),
)
@example(variant="rwkv4", turns=[([], 1)])
def test_turns_are_what_one_request_over_the_same_tokens_is(
    variant: Variant, turns: list[tuple[list[int], int]]
) -> None:
    engine, seen, conversation = make_engine(variant), [1], None
    for i, (ids, max_tokens) in enumerate(turns):
        prompt = [1, *ids] if i == 0 else ids
        seen += ids
        text, conversation = turn(engine, prompt, conversation, max_tokens=max_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        assert text == list(generate(MODELS[variant], seen, params, WORDS))
        # The end of a text is no part of what goes on, even where it is a token like others that happens to be last.
        seen += text[:-1] if text[-1:] == [WORDS.end_of_text_id] else text
        assert conversation.num_tokens == len(seen)
        assert engine.scheduler.n_free_slots == engine.pool.n_slots
        conversation = read(engine, written(engine, conversation))


def test_the_end_of_a_text_is_no_part_of_the_conversation() -> None:
    engine = make_engine()
    text, conversation = turn(engine, [1, 5, 6], max_tokens=9, ignore_eos=False, logit_bias={1: 100.0})
    assert text == [1]
    assert conversation.unread_ids == ()
    assert conversation.num_tokens == 3


def test_a_conversation_can_be_forked_and_stays_as_it_is() -> None:
    engine = make_engine()
    _, conversation = turn(engine, [1, 5, 6, 7, 8], max_tokens=3)
    before = load(written(engine, conversation))
    branches = [turn(engine, [i], conversation, max_tokens=5)[0] for i in (20, 30, 20)]
    assert branches[0] == branches[2]
    after = load(written(engine, conversation))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_cached_prefixes_and_conversations_do_not_meet() -> None:
    """A turn's prompt is not the beginning of a text, and must not be found, or found again, as if it were."""
    engine = make_engine()
    turn(engine, [20, 21, 22], max_tokens=3)  # leaves [20, 21, 22] in the cache
    _, conversation = turn(engine, [1, 5, 6], max_tokens=1)
    ids = [20, 21, 22]
    first, _ = turn(engine, ids, conversation, max_tokens=6)
    fresh, fresh_conversation = turn(make_engine(prefix_cache_bytes=0), [1, 5, 6], max_tokens=1)
    assert fresh == list(conversation.unread_ids)
    again, _ = turn(make_engine(prefix_cache_bytes=0), ids, fresh_conversation, max_tokens=6)
    assert first == again
    alone, _ = turn(engine, [*conversation.unread_ids, *ids], max_tokens=6)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    assert alone == list(generate(MODELS["conv"], [*conversation.unread_ids, *ids], params, WORDS))


def test_what_follows_a_conversation_is_read_once_for_all_its_forks() -> None:
    """In memory and from a file; each file of one content is one beginning."""
    engine = make_engine()
    _, conversation = turn(engine, [1, 5, 6, 7, 8], max_tokens=3)
    message = list(range(20, 40))
    for start in (conversation, read(engine, written(engine, conversation))):
        texts, cached = [], []
        for _ in range(3):
            one = Request("fork", [*start.unread_ids, *message], GREEDY_TURN, start=start, keep_conversation=True)
            engine.add_request(one)
            texts.append([o.token.token_id for o in finish(engine) if o.token])
            cached.append(one.num_cached_tokens)
        assert texts[0] == texts[1] == texts[2]
        assert cached == [0, 21, 21]
    salted = Request("fork", [*start.unread_ids, *message], GREEDY_TURN, start=start, cache_salt="another's")
    engine.add_request(salted)
    finish(engine)
    assert salted.num_cached_tokens == 0


def test_limits_count_the_whole_conversation() -> None:
    engine = make_engine(max_model_len=20)
    _, conversation = turn(engine, [1, *range(5, 15)], max_tokens=4)
    with pytest.raises(InvalidRequestError, match="is 20 tokens, but a prompt of 17 tokens and 5 new ones make 22"):
        turn(engine, [3, 4], conversation, max_tokens=5)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        engine.add_request(Request("b", []))


@pytest.fixture(scope="module")
def kept() -> tuple[LLMEngine, bytes]:
    engine = make_engine()
    _, conversation = turn(engine, [1, 5, 6, 7, 8], max_tokens=3)
    return engine, written(engine, conversation)


def test_damaged_files_are_refused(kept: tuple[LLMEngine, bytes]) -> None:
    """Bits flipped, ends cut off, bytes added or taken out: refused in a sentence, every one."""
    engine, data = kept
    chance = random.Random(0)
    read(engine, data)
    for i in range(N_CORRUPTED):
        broken = bytearray(data)
        match i % 4:
            case 0:
                for _ in range(chance.randrange(1, 4)):
                    broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
            case 1:
                del broken[chance.randrange(len(broken)) :]
            case 2:
                broken[(at := chance.randrange(len(broken))) : at] = chance.randbytes(chance.randrange(1, 50))
            case _:
                del broken[(at := chance.randrange(len(broken) - 50)) : at + chance.randrange(1, 50)]
        if bytes(broken) == data:
            continue
        with pytest.raises(InvalidConversationError, match=r"^[A-Z].*\.$"):
            read(engine, bytes(broken))


def test_foreign_and_newer_files_are_refused(kept: tuple[LLMEngine, bytes]) -> None:
    engine, data = kept
    with pytest.raises(InvalidConversationError, match="another model's"):
        read(make_engine("simple"), data)
    with pytest.raises(InvalidConversationError, match="not a conversation of this server"):
        read(engine, save({"x": torch.zeros(3)}))
    tensors = load(data)
    header = {"format": "aft-conversation", "model": engine.fingerprint.hex()}
    with pytest.raises(InvalidConversationError, match="version '4' of the format; this server reads 2 and 3"):
        read(engine, save(tensors, {**header, "version": "4"}))
    with pytest.raises(InvalidConversationError, match="version '2' of this model's state; this server reads '1'"):
        read(engine, save(tensors, {**header, "version": "3", "state_version": "2"}))
    for version in ("2", "3"):
        with pytest.raises(InvalidConversationError, match="checksum"):
            read(engine, save(tensors, {**header, "version": version, "checksum": "0" * 32}))


def test_what_a_file_says_is_not_said_again_at_length(kept: tuple[LLMEngine, bytes]) -> None:
    engine, data = kept
    header = {"format": "aft-conversation", "model": engine.fingerprint.hex()}
    for claim in ({"version": "9" * 10**6}, {"version": "3", "state_version": "9" * 10**6}):
        with pytest.raises(InvalidConversationError) as raised:
            read(engine, save(load(data), {**header, **claim}))
        assert len(str(raised.value)) < 300


def test_dtypes_that_pytorch_does_not_have_are_refused(kept: tuple[LLMEngine, bytes]) -> None:
    engine, _ = kept
    metadata = {"format": "aft-conversation", "version": "3", "model": engine.fingerprint.hex()}
    for dtype in ("F4", "F6_E2M3", "F8_E8M0", "U4"):
        tensor = {"dtype": dtype, "shape": [8], "data_offsets": [0, 8 if dtype == "F8_E8M0" else 4]}
        header = json.dumps({"__metadata__": metadata, "x": tensor}).encode()
        with pytest.raises(InvalidConversationError, match=r"^The conversation is damaged: .*\.$"):
            read(engine, len(header).to_bytes(8, "little") + header + bytes(8))


def sealed(engine: LLMEngine, tensors: dict[str, torch.Tensor], **claims: str) -> bytes:
    """A file of these tensors with all that the server writes beside them."""
    metadata = {"format": "aft-conversation", "version": "3", "model": engine.fingerprint.hex(), **claims}
    return save(tensors, {**metadata, "checksum": _checksum(metadata, tensors)})


@pytest.mark.parametrize(
    "change",
    [
        {"logits": torch.zeros(3)},
        {"logits": torch.full((400,), float("inf"))},
        {"unread_ids": torch.tensor([400])},
        {"unread_ids": torch.tensor([-1])},
        {"layers.0.keys": torch.zeros(1, 2, 4)},
        {"extra": torch.zeros(1)},
        {"extra": torch.zeros(())},
        {"unread_ids": torch.tensor(1)},
    ],
)
def test_files_made_badly_are_refused_whatever_their_checksum_says(
    change: dict[str, torch.Tensor], kept: tuple[LLMEngine, bytes]
) -> None:
    engine, data = kept
    with pytest.raises(InvalidConversationError, match="does not have the tensors of this model's state"):
        read(engine, sealed(engine, {**load(data), **change}))


def test_more_tokens_than_a_text_may_have_are_refused(kept: tuple[LLMEngine, bytes]) -> None:
    engine, data = kept
    longest = engine.max_model_len
    for position, shown in ((2**63 - 1, 2**63), (2**62, 2**62 + 1), (longest, longest + 1), (-5, -4)):
        with pytest.raises(InvalidConversationError, match=f"has {shown} tokens, but from 0 to {longest} are allowed"):
            read(engine, sealed(engine, {**load(data), "position": torch.tensor([position])}))
    for n, sentence in (
        (2, "2 tokens that were not read, but a text leaves at most 1"),
        (2 * longest, f"has {2 * longest + 7} tokens"),
    ):
        with pytest.raises(InvalidConversationError, match=sentence):
            read(engine, sealed(engine, {**load(data), "unread_ids": torch.full((n,), 5)}))


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_that_no_text_can_leave_are_refused(variant: Variant) -> None:
    """One number changed, in each tensor of each layer, to what no token could have made of it."""
    engine = make_engine(variant)
    _, conversation = turn(engine, [1, *range(5, 45)], max_tokens=3)
    tensors = load(written(engine, conversation))
    read(engine, sealed(engine, tensors))
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            continue
        wrong = [*NOT_FINITE]
        if name.endswith("sums"):  # the last is the denominator
            wrong += [-1.0, 1e20]
        for value in wrong:
            changed = tensor.clone()
            changed.view(-1)[0 if name.endswith("keys") else -1] = value  # the last slots may rightly be empty
            with pytest.raises(InvalidConversationError, match="has a state that no text can have left"):
                read(engine, sealed(engine, {**tensors, name: changed}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_before_a_texts_beginning_is_empty(variant: Variant) -> None:
    engine = make_engine(variant)
    begun = {**load(written(engine, turn(engine, [1, *range(5, 45)], max_tokens=3)[1])), "position": torch.tensor([0])}
    with pytest.raises(InvalidConversationError, match="has a state that no text can have left"):
        read(engine, sealed(engine, begun))


@settings(max_examples=30)
@given(
    variant=st.sampled_from(VARIANTS), n_read=st.integers(0, 300), n_stepped=st.integers(0, 5), scale=st.floats(-8, 8)
)
def test_what_a_text_leaves_is_possible(variant: Variant, n_read: int, n_stepped: int, scale: float) -> None:
    """Read in parallel or token by token, before the window is full and long after, whatever the weights."""
    model = copy.deepcopy(MODELS[variant])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10**scale) if scale < 0 else parameter.mul_(1 + scale)
    limit = model.config.context_limit or 10**6
    ids = torch.randint(0, 400, (1, max(0, min(n_read, limit - n_stepped))), generator=torch.Generator().manual_seed(0))
    state = model.init_state(1)
    if ids.shape[1]:
        state = model(ids, state)[1]
    for i in range(n_stepped):
        state = model.step(torch.tensor([i]), state)[1]
    if all(bool(tensor.nan_to_num(neginf=0.0).isfinite().all()) for tensor in state.tensors()):
        assert all(model.is_possible(layer, int(state.position)) for layer in state.layers)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
DTYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64", "F4",
          "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U4", "nonsense"]  # fmt: skip
SIZES = st.integers(0, 9) | st.integers(-(2**70), 2**70)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.tuples(SIZES, SIZES).map(list),
    }
)


@settings(max_examples=150)
@given(data=st.data())
def test_every_crafted_file_is_refused_in_a_sentence(kept: tuple[LLMEngine, bytes], data: st.DataObject) -> None:
    """Any header over any bytes, and the server's own tensors in any dtype and shape, with all else right."""
    engine, file = kept
    metadata = {"format": "aft-conversation", "version": "3", "model": engine.fingerprint.hex()}
    if data.draw(st.booleans()):
        names = st.sampled_from([*sorted(load(file)), "extra"])
        header: Any = data.draw(st.dictionaries(names, ENTRIES | JSON_VALUES, max_size=4))
        claims = data.draw(
            st.just({}) | st.dictionaries(st.sampled_from([*metadata, "checksum", "state_version"]), JSON_VALUES)
        )
        header["__metadata__"] = data.draw(JSON_VALUES | st.just({**metadata, **claims}))
        text = json.dumps(data.draw(st.just(header) | JSON_VALUES)).encode()
        length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
        crafted = length.to_bytes(8, "little") + text + data.draw(st.binary(max_size=64))
    else:
        tensors = load(file)
        name = data.draw(st.sampled_from(sorted(tensors)))
        dtype = data.draw(st.sampled_from([torch.bool, torch.uint8, torch.int16, torch.float16, torch.float64,
                                           torch.complex64, torch.float8_e4m3fn, torch.uint64]))  # fmt: skip
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        crafted = sealed(engine, {**tensors, name: torch.ones(shape).to(dtype)})
    with pytest.raises(InvalidConversationError, match=r"(?s)^The conversation .*\.$|^This is not a conversation.*\.$"):
        read(engine, crafted)


@settings(max_examples=100)
@given(data=st.data())
def test_what_is_taken_can_be_gone_on_from(kept: tuple[LLMEngine, bytes], data: st.DataObject) -> None:
    """Numbers of a file changed to any others: refused, or followed by a text, or by an error of that request."""
    engine, file = kept
    tensors = load(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    changed = tensors[name].clone()
    values: st.SearchStrategy[float] = (
        st.floats(width=32) if changed.is_floating_point() else st.integers(-3, 2**63 - 1)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        changed.view(-1)[data.draw(st.integers(0, changed.numel() - 1))] = data.draw(values)
    try:
        start = read(engine, sealed(engine, {**tensors, name: changed}))
    except InvalidConversationError:
        return
    request = Request("a", [*start.unread_ids, 7], GREEDY_TURN, start=start)
    engine.add_request(request)
    outputs = finish(engine)
    assert outputs[-1].finish_reason or isinstance(outputs[-1].error, GenerationError)
    assert not engine.has_work
