"""Messages of a chat to one prompt, by the Jinja template of the checkpoint, as Hugging Face renders it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.tokenizer import Tokenizer
from server.errors import ConfigurationError, InvalidRequestError

TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
# A model without a template has not learned roles: it goes on from the messages, put one after another.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ message.content }}{% endfor %}"
)


class ChatTemplate:
    """Raises ConfigurationError for a template that does not parse."""

    def __init__(self, source: str = DEFAULT_TEMPLATE) -> None:
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = _to_json  # jinja's own escapes what HTML would misread
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"The chat template is not valid: {error}.") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Of chat_template.jinja or tokenizer_config.json in a checkpoint's folder, or the default."""
        if (path := folder / TEMPLATE_FILE).is_file():
            return cls(path.read_text(encoding="utf-8"))
        if (path := folder / TOKENIZER_CONFIG_FILE).is_file():
            try:
                source = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise ConfigurationError(f"{path} is not a JSON object: {error}.") from error
            if isinstance(source, str):
                return cls(source)
        return cls()

    def token_ids(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The prompt. Raises InvalidRequestError if the template refuses the messages.

        add_generation_prompt: whether an answer is begun; continue_final_message: whether the prompt ends with the
        content of the last message instead, without what the template writes after it.

        `bos_token` and `eos_token` of the template become the end-of-text token; the same characters in a message do
        not, because for the time of the rendering the token has a secret name.
        """
        mark = f"<{secrets.token_hex(16)}>"
        end = f"<{secrets.token_hex(16)}> " if continue_final_message else ""
        if end:
            *earlier, last = messages
            messages = [*earlier, {**last, "content": last["content"] + end}]
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                bos_token=mark,
                eos_token=mark,
                tools=None,
                documents=None,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(f"messages do not fit the model's chat template: {error}.") from error
        if end:
            text = _up_to(text, end)
        first, *rest = text.split(mark)
        # A template that begins with bos_token does what many tokenizers do by themselves: once is enough.
        ids = tokenizer.encode_text(first) if first or not rest else []
        for part in rest:
            ids += [tokenizer.end_of_text_id, *tokenizer.encode(part)]
        return ids


class _Generation(Extension):
    """{% generation %} marks what an assistant says, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's name

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _up_to(text: str, end: str) -> str:
    """What comes before `end`, whose space is gone if the template strips messages: then it is stripped here, too."""
    before, found, after = text.rpartition(end.rstrip())
    if not found:
        raise InvalidRequestError("continue_final_message: the model's chat template does not write the last message.")
    return before if after.startswith(" ") else before.rstrip()


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
