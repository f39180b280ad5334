"""Messages of a chat to one prompt, by the Jinja template of the checkpoint, as Hugging Face renders it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.tokenizer import Tokenizer
from server.api import template_renderer
from server.errors import ConfigurationError, InvalidRequestError, OverloadedError

TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
# A model without a template has not learned roles: it goes on from the messages, put one after another.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ message.content }}{% endfor %}"
)


class ChatTemplate:
    """Raises ConfigurationError for a template that does not parse, or does not end for a chat of one message."""

    def __init__(self, source: str = DEFAULT_TEMPLATE) -> None:
        self.source = source
        if source != DEFAULT_TEMPLATE:
            try:
                self._render(messages=[{"role": "user", "content": "Hello"}], bos_token="", eos_token="")
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

    def token_ids(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The prompt. Raises InvalidRequestError if the template refuses the messages, or takes too long for them.

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
        text = self._render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            bos_token=mark,
            eos_token=mark,
        )
        if end:
            text = _up_to(text, end)
        first, *rest = text.split(mark)
        # A template that begins with bos_token does what many tokenizers do by themselves: once is enough.
        ids = tokenizer.encode_text(first) if first or not rest else []
        for part in rest:
            ids += [tokenizer.end_of_text_id, *tokenizer.encode(part)]
        return ids

    def _render(self, **variables: Any) -> str:
        variables = {"add_generation_prompt": True, "tools": None, "documents": None} | variables
        if self.source == DEFAULT_TEMPLATE:
            return template_renderer.render(self.source, variables)
        return _processes.render(self.source, variables)


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


class _Processes:
    """Processes that render any template, so that none can hold up this one. May be called from any thread.

    None is there before the first template; one that its limits ended is replaced. They end with this process.
    """

    MOST, WAIT = 2, 4.0 * template_renderer.SECONDS  # in which one of them becomes free, whatever the others render
    ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ")  # the rest holds secrets

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._free = threading.Semaphore(self.MOST)

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """Raises InvalidRequestError, ConfigurationError for an invalid template, and OverloadedError."""
        if not self._free.acquire(timeout=self.WAIT):
            raise OverloadedError("The chats before this one take long to be rendered; try again later.")
        try:
            answer = self._ask({"source": source, "variables": variables, "seconds": template_renderer.SECONDS})
        finally:
            self._free.release()
        if "invalid" in answer:
            raise ConfigurationError(f"The chat template is not valid: {answer['invalid']}.")
        if "refused" in answer:
            raise InvalidRequestError(f"messages do not fit the model's chat template: {answer['refused']}.")
        return answer["text"]

    def close(self) -> None:
        """End those that render nothing."""
        while self._idle:
            _end(self._idle.pop())

    def _ask(self, job: dict[str, Any]) -> dict[str, str]:
        process = self._take()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            limit = f"{template_renderer.MEMORY // 2**20} MiB"
            if _end(process) == -signal.SIGPROF:
                limit = f"{template_renderer.SECONDS:g} seconds"
            raise _LimitError(f"messages take more than {limit} to be rendered by the model's chat template.")
        self._idle.append(process)
        answer: dict[str, str] = json.loads(line)
        return answer

    def _take(self) -> subprocess.Popen[bytes]:
        while self._idle:
            try:
                process = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if process.poll() is None:
                return process
            _end(process)
        environment = {name: os.environ[name] for name in self.ENVIRONMENT if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", template_renderer.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # a terminal's interrupt is the server's alone
        )


def _end(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that ends, or has ended."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be written
            if pipe:
                pipe.close()
    return process.wait()


_processes = _Processes()
atexit.register(_processes.close)
