"""`aft`, the command: serve, generate, train, bench, batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

from model.checkpoint import load_checkpoint
from model.errors import ModelError
from model.training.__main__ import main as train
from model.transformer import AFTForCausalLM
from server import BUNDLED_MODEL
from server.api.app import create_app
from server.api.chat_template import ChatTemplate
from server.api.config import APIConfig
from server.batch import main as batch
from server.bench import main as bench
from server.draining import DrainingServer
from server.engine import LLM, EngineConfig, LLMEngine, PrefixStore, SamplingParams
from server.errors import ConfigurationError, ServerError
from server.logs import LogFormat, configure_logging
from server.sessions import SessionsConfig, open_prefix_store, open_store

MIB = 2**20
SMALL_MODEL = 30_000_000  # parameters
# The engine gives up the interpreter at every tensor operation, and should not wait 5 ms to have it back.
SWITCH_SECONDS = 0.0005
# Every option of a command can be given as a variable: --max-num-seqs as AFT_MAX_NUM_SEQS.
BY_ENVIRONMENT = {"auto_envvar_prefix": "AFT"}

app = typer.Typer(
    name="aft",
    help="Text generation with Attention Free Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(context_settings=BY_ENVIRONMENT)
def serve(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in /v1/models and in requests; the folder's if left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of a step; all if left out, but one less for models under 30 M parameters."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its text together; what the model can read if left out.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded at a time.")] = 32,
    state_memory: Annotated[int, typer.Option(help="MiB for their states; a bound on --max-num-seqs.")] = 1024,
    max_queue_length: Annotated[int, typer.Option(help="Requests that may wait; beyond it, 429.")] = 256,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a prompt read at a time, between tokens of others.")] = 256,
    prefix_cache: Annotated[int, typer.Option(help="MiB of states after prompts that may come again.")] = 256,
    batch_invariant: Annotated[bool, typer.Option(help="Bitwise the same text in any batch; slower.")] = False,
    store: Annotated[
        str | None, typer.Option(help="SQLite file or redis:// URL that keeps sessions; in memory if left out.")
    ] = None,
    prefix_store: Annotated[int, typer.Option(help="MiB in the store for what leaves the prefix cache.")] = 0,
    session_ttl: Annotated[float, typer.Option(help="Seconds after its last use when a session is forgotten.")] = 86400,
    max_sessions: Annotated[int, typer.Option(help="Sessions of one API key.")] = 10_000,
    max_body_size: Annotated[int, typer.Option(help="MiB of a request's body.")] = 4,
    max_prompts: Annotated[int, typer.Option(help="Prompts of a request.")] = 128,
    max_grammar_length: Annotated[int, typer.Option(help="Characters of a JSON schema or regular expression.")] = 65536,
    grammar_timeout: Annotated[float, typer.Option(help="Seconds in which a grammar must compile.")] = 5.0,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds after which a request fails.")] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    api_keys: Annotated[
        str | None,
        typer.Option(help="Keys that requests must send, separated by spaces. Better in AFT_API_KEYS than here."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of such keys, one in a line.")] = None,
    cors_origins: Annotated[
        str, typer.Option(help="Web origins whose pages may read answers, separated by spaces; * for all.")
    ] = "",
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector that gets traces, http://host:4318 say.")
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Log lines for people or for machines.")] = "text",
) -> None:
    """Serve a checkpoint over HTTP. SIGTERM lets running requests end first."""
    configure_logging(log_format)
    api_config = APIConfig(
        model_name=served_model_name or model.resolve().name,
        request_timeout=request_timeout,
        max_body_size=max_body_size * MIB,
        max_prompts=max_prompts,
        api_keys=_api_keys(api_keys, api_key_file),
        cors_origins=tuple(cors_origins.split()),
        otlp_endpoint=otlp_endpoint,
    )
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        state_memory=state_memory * MIB,
        max_queue_length=max_queue_length,
        chunk_size=chunk_size,
        prefix_cache_bytes=prefix_cache * MIB,
        max_grammar_length=max_grammar_length,
        grammar_timeout=grammar_timeout,
        batch_invariant=batch_invariant,
    )
    network, tokenizer = load_checkpoint(model, device)
    torch.set_num_threads(threads or default_threads(network))
    sys.setswitchinterval(SWITCH_SECONDS)
    application = create_app(
        LLMEngine(network, tokenizer, config),
        api_config,
        ChatTemplate.load(model),
        open_store(store) if store else None,
        SessionsConfig(session_ttl=session_ttl, max_sessions=max_sessions),
        choose_prefix_store(store, prefix_store * MIB, config),
    )
    uvicorn_config = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # for clients that do not read; the others were waited for before
    )
    DrainingServer(uvicorn_config, application.state.context.engine, drain_timeout).run()


def default_threads(network: AFTForCausalLM) -> int:
    """Beside a small model, HTTP takes most of a core, and a step that wants that one too waits for it."""
    return max(1, torch.get_num_threads() - (network.num_parameters < SMALL_MODEL))


def choose_prefix_store(store: str | None, max_bytes: int, config: EngineConfig) -> PrefixStore | None:
    """Raises ConfigurationError, also for what could never be used."""
    if max_bytes < 0:
        raise ConfigurationError(f"prefix_store must be at least 0, not {max_bytes // MIB}.")
    if not max_bytes:
        return None
    if not store:
        raise ConfigurationError("prefix_store needs store, an SQLite file or a Redis; set it or leave both out.")
    if not config.prefix_cache_bytes:
        raise ConfigurationError("prefix_store keeps what leaves the prefix cache, so prefix_cache must be at least 1.")
    return open_prefix_store(store, max_bytes)


def _api_keys(given: str | None, path: Path | None) -> tuple[str, ...]:
    """Raises ConfigurationError where keys are asked for and there is none: an empty file must not open the server."""
    if given is None and path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"api_key_file cannot be read: {error}.") from error
    keys = (*(given or "").split(), *(line.strip() for line in lines if line.strip()))
    if not keys:
        raise ConfigurationError("api_keys and api_key_file hold no key; leave them out to serve everyone.")
    return keys


@app.command(context_settings=BY_ENVIRONMENT)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the text goes on from.")] = "",
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely tokens.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the fewest likely tokens whose probabilities reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Write a text on the terminal, without a server."""
    llm = LLM(model, EngineConfig(max_num_seqs=1), device=device)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sys.stdout.write(prompt)
    for token in llm.tokens(prompt, params):
        if not token.special:
            sys.stdout.write(token.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


app.command("train", context_settings=BY_ENVIRONMENT)(train)
app.command("bench", context_settings=BY_ENVIRONMENT)(bench)
app.command("batch", context_settings=BY_ENVIRONMENT)(batch)


def main() -> None:
    try:
        app()
    except (ModelError, ServerError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
