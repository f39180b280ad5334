"""Messages of a chat to one prompt, by the Jinja template of the checkpoint, as Hugging Face renders it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from model.tokenizer import Tokenizer
from server.api import template_renderer
from server.errors import ConfigurationError, InvalidRequestError
from server.limited_processes import MEMORY, LimitedProcesses

TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
SECONDS = 5.0  # of computing, for each chat
PATIENCE = 20.0  # seconds in which others' chats have been rendered
# A model without a template has not learned roles: it goes on from the messages, put one after another.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ message.content }}{% endfor %}"
)


class ChatTemplate:
    """Raises ConfigurationError for a template that does not parse, or does not end for a chat of one message.

    Any but the default one is rendered in processes of its own, so that none can hold up this one.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE) -> None:
        self.source = source
        self._processes = LimitedProcesses(template_renderer.__name__, SECONDS, PATIENCE)
        if source != DEFAULT_TEMPLATE:
            try:
                self.render([{"role": "user", "content": "Hello"}])
            except _LimitError as error:
                raise ConfigurationError(str(error)) from error
            except InvalidRequestError:
                pass  # it wants other messages

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Of chat_template.jinja or tokenizer_config.json in a checkpoint's folder, or the default."""
        for path in (folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG_FILE):
            if path.is_file():
                try:
                    content = path.read_text(encoding="utf-8")
                    source = content if path.name == TEMPLATE_FILE else _template_of(content)
                except UnicodeDecodeError as error:
                    raise ConfigurationError(f"{path} must be UTF-8: {error}.") from error
                except (ValueError, RecursionError) as error:
                    raise ConfigurationError(f"{path}: {error}.") from error
                return cls() if source is None else cls(source)
        return cls()

    async def render_in_thread(self, messages: Sequence[dict[str, Any]], **options: bool) -> list[str]:
        """As `render`, without holding up the event loop. Raises OverloadedError, too."""
        busy = "The chats before this one take long to be rendered; try again later."
        return await self._processes.in_thread(busy, partial(self.render, messages, **options))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[str]:
        """The prompt: texts with an end-of-text token between each two.

        add_generation_prompt: whether an answer is begun; continue_final_message: whether the prompt ends with the
        content of the last message instead, without what the template writes after it. Raises InvalidRequestError if
        the template refuses the messages, or takes too much for them.

        `bos_token` and `eos_token` of the template become the end-of-text token; the same characters in a message do
        not, because for the time of the rendering the token has a secret name.
        """
        mark = f"<{secrets.token_hex(16)}>"
        end = f"<{secrets.token_hex(16)}> " if continue_final_message else ""
        if end:
            *earlier, last = messages
            messages = [*earlier, {**last, "content": last["content"] + end}]
        text = self._render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            bos_token=mark,
            eos_token=mark,
            tools=None,
            documents=None,
        )
        return (_up_to(text, end) if end else text).split(mark)

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _render(self, **variables: Any) -> str:
        if self.source == DEFAULT_TEMPLATE:
            return template_renderer.render(self.source, variables)
        try:
            answer = self._processes.ask({"source": self.source, "variables": variables})
        except (TimeoutError, MemoryError) as error:
            limit = f"{SECONDS:g} seconds" if isinstance(error, TimeoutError) else f"{MEMORY // 2**20} MiB"
            raise _LimitError(
                f"messages take more than {limit} to be rendered by the model's chat template."
            ) from error
        if "invalid" in answer:
            raise ConfigurationError(f"The chat template is not valid: {answer['invalid']}.")
        if "refused" in answer:
            raise InvalidRequestError(f"messages do not fit the model's chat template: {answer['refused']}.")
        return answer["text"]


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The token ids of what `ChatTemplate.render` gives."""
    first, *rest = texts
    # A template that begins with bos_token does what many tokenizers do by themselves: once is enough.
    ids = tokenizer.encode_text(first) if first or not rest else []
    for text in rest:
        ids += [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    return ids


def _template_of(content: str) -> str | None:
    """The template of a tokenizer_config.json: that of the name "default", if it has several. Raises ValueError."""
    described = json.loads(content)
    if not isinstance(described, dict):
        raise ValueError("it must be a JSON object")
    match described.get("chat_template"):
        case None | str() as source:
            return source
        case [*several] if all(isinstance(one, dict) and isinstance(one.get("template"), str) for one in several):
            by_name = {one.get("name"): one["template"] for one in several}
            if "default" in by_name:
                return str(by_name["default"])
            raise ValueError(f'chat_template must have one with the name "default"; it has {[*by_name]}')
    raise ValueError("chat_template must be a text, or a list of objects with name and template")


def _up_to(text: str, end: str) -> str:
    """What comes before `end`, whose space is gone if the template strips messages: then it is stripped here, too."""
    before, found, after = text.rpartition(end.rstrip())
    if not found:
        raise InvalidRequestError("continue_final_message: the model's chat template does not write the last message.")
    return before if after.startswith(" ") else before.rstrip()


class _LimitError(InvalidRequestError):
    """The process of a template was ended by its limits."""
