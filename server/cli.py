"""`aft`, the command: serve, generate, convert, train, bench, batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from model.runner import Quantization

from model.convert import convert as convert_model
from model.errors import ModelError
from model.training.__main__ import main as train
from server import BUNDLED_MODEL
from server.api.config import APIConfig
from server.batch import main as batch
from server.bench import main as bench
from server.config import ServerConfig
from server.draining import DrainingServer
from server.engine import LLM, EngineConfig, SamplingParams
from server.errors import ConfigurationError, ServerError
from server.logs import LogFormat
from server.sessions import SessionsConfig

MIB = 2**20
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
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BUNDLED_MODEL,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in /v1/models and in requests; the folder's if left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a step; if left out, one for each core that it may use.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its text together; what the model can read if left out.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Texts that are decoded at a time.")] = 32,
    state_memory: Annotated[int, typer.Option(help="MiB for their states; a bound on --max-num-seqs.")] = 1024,
    max_queue_length: Annotated[int, typer.Option(help="Requests that may wait; beyond it, 429.")] = 256,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a prompt read at a time, between tokens of others.")] = 256,
    prefix_cache: Annotated[int, typer.Option(help="MiB of states after prompts that may come again.")] = 256,
    batch_invariant: Annotated[
        bool, typer.Option(help="Bitwise the same text in any batch; slower where no compiled kernels run.")
    ] = False,
    quantize: Annotated[Quantization | None, typer.Option(help="Keep matrices in 8 bits; CPUs only.")] = None,
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
    ray: Annotated[bool, typer.Option(help="Serve by replicas under Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(help="Replicas, with --ray.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Replicas under load, with --ray; no more than without it if left out.")
    ] = None,
) -> object:
    """Serve a checkpoint over HTTP. SIGTERM lets running requests end first."""
    config = ServerConfig(
        model=model.resolve(),
        device=device,
        threads=threads,
        host=host,
        port=port,
        store=store if store is None or "://" in store else str(Path(store).resolve()),
        prefix_store=prefix_store * MIB,
        drain_timeout=drain_timeout,
        log_format=log_format,
        replicas=replicas,
        max_replicas=max_replicas,
        api=APIConfig(
            model_name=served_model_name or model.resolve().name,
            request_timeout=request_timeout,
            max_body_size=max_body_size * MIB,
            max_prompts=max_prompts,
            api_keys=_api_keys(api_keys, api_key_file),
            cors_origins=tuple(cors_origins.split()),
            otlp_endpoint=otlp_endpoint,
        ),
        engine=EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            state_memory=state_memory * MIB,
            max_queue_length=max_queue_length,
            chunk_size=chunk_size,
            prefix_cache_bytes=prefix_cache * MIB,
            max_grammar_length=max_grammar_length,
            grammar_timeout=grammar_timeout,
            batch_invariant=batch_invariant,
            quantize=quantize,
        ),
        sessions=SessionsConfig(session_ttl=session_ttl, max_sessions=max_sessions),
    )
    if not ray and config.most_replicas > 1:
        raise ConfigurationError("replicas and max_replicas need --ray.")
    run = context.obj or (_on_ray() if ray else _alone)
    return run(config)


def _alone(config: ServerConfig) -> None:
    """Serve in this process."""
    application = config.build()
    uvicorn_config = uvicorn.Config(
        application,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # for clients that do not read; the others were waited for before
    )
    DrainingServer(uvicorn_config, application.state.context.engine, config.drain_timeout).run()


def _on_ray() -> Callable[[ServerConfig], None]:
    """Raises ConfigurationError where the packages of the "ray" extra are not installed."""
    try:
        from server.deploy.replicas import run
    except ImportError as error:
        raise ConfigurationError("ray needs Ray Serve: pip install 'ray[serve]'.") from error
    return run


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


@app.command(context_settings=BY_ENVIRONMENT)
def convert(
    source: Annotated[Path, typer.Argument(help="RWKV-4 model: a folder of Hugging Face's layout, or a .pth file.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or rwkv_vocab_v20230424.txt, if it is not beside the model.")
    ] = None,
) -> None:
    """Make a checkpoint of an RWKV-4 model. Nothing in its files is executed."""
    model = convert_model(source, out, tokenizer)
    typer.echo(f"{model.num_parameters:,} parameters, {model.config.dtype}, in {out}")


app.command("train", context_settings=BY_ENVIRONMENT)(train)
app.command("bench", context_settings=BY_ENVIRONMENT)(bench)
app.command("batch", context_settings=BY_ENVIRONMENT)(batch)


def main() -> None:
    try:
        app()
    except (ModelError, ServerError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
