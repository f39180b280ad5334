"""From what a body asks for to streams of the engine: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from model.sampling import SamplingParams
from server.api.context import Context, owner_of, prefix_salt
from server.api.record import record_of
from server.api.turns import TextStream, TurnStream, close
from server.engine import Admission, Conversation, RequestStream
from server.errors import InvalidRequestError

Prompt = str | list[int]
MAX_WHOLE_TOKENS, MAX_WHOLE_LOGPROBS = 2**20, 2**18  # of an answer in one piece, which is kept until it is complete
MAX_PROMPT_LOGPROBS = 2**20  # which are told in one piece, in a stream as well


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a body of any contract asks of the engine, as `AsyncEngine.submit` takes it.

    model: the name that the body asks for; session_id: of the session whose next turn this is; it then has one prompt,
    and one text; streams: whether the answer comes in pieces.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    model: str | None = None
    session_id: str | None = None
    add_special_tokens: bool = True
    truncate: int | None = None
    priority: int = 0
    cache_salt: str = ""
    streams: bool = False

    def check_size(self) -> None:
        """Raises InvalidRequestError for more than one piece can hold."""
        params, n_texts = self.params, len(self.prompts) * self.params.n_generated
        n_tokens = n_texts * params.max_tokens
        n_logprobs = 0 if params.logprobs is None else n_tokens * (1 + params.logprobs)
        for n, most, what in (
            (n_tokens, MAX_WHOLE_TOKENS, "tokens"),
            (n_logprobs, MAX_WHOLE_LOGPROBS, "log-probabilities"),
        ):
            if n > most and not self.streams:
                raise InvalidRequestError(
                    f"{n_texts} texts of {params.max_tokens} tokens may have {n} {what}, but an answer in one piece at "
                    f"most {most}: ask for a stream, or for less."
                )


def admit(http_request: Request, context: Context, *, model: str | None, n_prompts: int = 1) -> Admission:
    """Places for the prompts, before any work is done for them.

    Raises NotFoundError for another model, InvalidRequestError for too many prompts, and as `AsyncEngine.admit`.
    """
    context.model_named(model)
    if n_prompts > context.config.max_prompts:
        raise InvalidRequestError(f"prompt must hold at most {context.config.max_prompts} texts, not {n_prompts}.")
    return context.engine.admit(n_prompts, owner_of(http_request))


async def open_streams(
    http_request: Request, context: Context, admission: Admission, submission: Submission
) -> list[TextStream]:
    """A stream for each prompt, all or none. Raises as `AsyncEngine.submit` and `Sessions.begin_turn`."""
    submission.check_size()
    if submission.session_id is not None:
        return [await _open_turn(http_request, context, admission, submission, submission.session_id)]
    streams: list[TextStream] = []
    try:
        for prompt in submission.prompts:  # one by one: those before an error must be closed
            stream = await _submit(http_request, context, admission, submission, prompt)
            streams.append(stream)
    except BaseException:
        close(streams)
        raise
    return streams


async def _open_turn(
    http_request: Request, context: Context, admission: Admission, submission: Submission, session_id: str
) -> TurnStream:
    if len(submission.prompts) != 1 or submission.params.n_generated != 1:
        raise InvalidRequestError("A turn of a session has one prompt and one text.")
    (prompt,) = submission.prompts
    turn = await context.sessions.begin_turn(session_id, owner_of(http_request))
    try:
        # Only the first turn follows the token that starts every text.
        start_id = context.engine.info.tokenizer.end_of_text_id
        if turn.start is not None and isinstance(prompt, list) and prompt[:1] == [start_id]:
            prompt = prompt[1:]
        stream = await _submit(
            http_request, context, admission, submission, prompt, start=turn.start, keep_conversation=True
        )
    except BaseException:
        turn.release()
        raise
    return TurnStream(stream, turn)


async def _submit(
    http_request: Request,
    context: Context,
    admission: Admission,
    submission: Submission,
    prompt: Prompt,
    *,
    start: Conversation | None = None,
    keep_conversation: bool = False,
) -> RequestStream:
    stream = await context.engine.submit(
        prompt,
        submission.params,
        admission=admission,
        add_special_tokens=submission.add_special_tokens and start is None,
        truncate=submission.truncate,
        priority=submission.priority,
        timeout=context.config.request_timeout,
        cache_salt=prefix_salt(http_request, context, submission.cache_salt),
        start=start,
        keep_conversation=keep_conversation,
    )
    record_of(http_request).streams.append(stream)
    request = stream.request
    if request.params.prompt_logprobs is not None:
        n = request.num_prompt_tokens * (1 + request.params.prompt_logprobs)
        if n > MAX_PROMPT_LOGPROBS:
            stream.close()
            raise InvalidRequestError(
                f"A prompt of {request.num_prompt_tokens} tokens has {n} log-probabilities, but at most "
                f"{MAX_PROMPT_LOGPROBS} are told."
            )
    return stream
