"""What happens around every route: keys, limits, ids, log lines, traces, metrics, CORS."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from model import load_checkpoint
from server.api.app import create_app
from server.api.config import APIConfig
from server.engine import EngineConfig, LLMEngine
from server.errors import ConfigurationError
from server.logs import TextFormatter, configure_logging

BODY = {"inputs": "The fox", "parameters": {"max_new_tokens": 3}}
OPENAI_BODY = {"prompt": "The fox", "max_tokens": 3}


@contextmanager
def serving(checkpoint: Path, engine_config: EngineConfig | None = None, **options: Any) -> Iterator[TestClient]:
    model, tokenizer = load_checkpoint(checkpoint)
    app = create_app(LLMEngine(model, tokenizer, engine_config), APIConfig(**options))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_keys(checkpoint: Path) -> None:
    with serving(checkpoint, api_keys=("first-key", "second-key")) as client:
        for path, body in (("/generate", BODY), ("/v1/completions", OPENAI_BODY), ("/tokenize", {"inputs": "a"})):
            for value in (None, "Bearer", "Bearer third-key", "Basic first-key", "first-key"):
                headers = {} if value is None else {"Authorization": value}
                refused = client.post(path, json=body, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert "error" in refused.json()
            for key in ("first-key", "second-key"):
                assert client.post(path, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
                assert client.post(path, json=body, headers={"x-api-key": key}).status_code == 200
            both = {"Authorization": "Bearer third-key", "x-api-key": "first-key"}
            assert client.post(path, json=body, headers=both).status_code == 401
            assert client.post(path, json=body, headers={"x-api-key": "third-key"}).status_code == 401
        assert client.get("/v1/models").status_code == 401
        for path in ("/health", "/ready", "/metrics", "/ui", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_keys_are_never_logged(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(checkpoint, api_keys=("a-secret-key",)) as client:
        client.post("/generate", json=BODY, headers={"Authorization": "Bearer a-secret-key"})
        client.post("/generate", json=BODY, headers={"Authorization": "Bearer another-secret"})
    assert len([record for record in caplog.records if record.message == "request"]) == 2
    logged = "".join(json.dumps(vars(record), default=str) for record in caplog.records)
    assert "secret" not in logged


def test_a_key_with_a_space_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="api_keys"):
        APIConfig(api_keys=("a key",))


def test_bodies_are_limited(checkpoint: Path) -> None:
    with serving(checkpoint, max_body_size=1000) as client:
        content = json.dumps({**BODY, "inputs": "x" * 2000}).encode()
        pieces = [content[i : i + 100] for i in range(0, len(content), 100)]
        for path in ("/generate", "/v1/completions"):
            for sent in (content, iter(pieces)):  # with a Content-Length, and without one
                refused = client.post(path, content=sent, headers={"content-type": "application/json"})
                assert refused.status_code == 413, refused.text
                assert "The body must have at most 1000 bytes." in refused.text
        assert client.post("/generate", json=BODY).status_code == 200


# A product of automata, which would take hours.
SLOW_SCHEMA = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 15)]}


def test_grammars_are_limited(checkpoint: Path) -> None:
    with serving(checkpoint, EngineConfig(max_grammar_length=20)) as client:
        grammar = {"type": "regex", "value": "a" * 21}
        refused = client.post("/generate", json={**BODY, "parameters": {"grammar": grammar}})
        assert refused.status_code == 422
        assert refused.json()["error"] == "parameters.grammar.value must have at most 20 characters here, not 21."
    with serving(checkpoint, EngineConfig(grammar_timeout=0.05)) as client:
        refused = client.post("/v1/completions", json={**OPENAI_BODY, "structured_outputs": {"json": SLOW_SCHEMA}})
        assert refused.status_code == 400
        message = "structured_outputs.json cannot be followed: it takes more than the 0.05 seconds it may take here."
        assert refused.json()["error"]["message"] == message


def test_request_ids(checkpoint: Path) -> None:
    with serving(checkpoint) as client:
        made = [client.post("/generate", json=BODY).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        given = client.post("/v1/completions", json=OPENAI_BODY, headers={"x-request-id": "trace-7"})
        assert given.headers["x-request-id"] == "trace-7"
        assert given.json()["id"] == "cmpl-trace-7"
        for bad in ("with space", "x" * 129, ""):
            assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad
        assert client.post("/generate", json={}).headers["x-request-id"]


def test_cors_is_off_unless_asked_for(checkpoint: Path) -> None:
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with serving(checkpoint) as client:
        assert "access-control-allow-origin" not in client.options("/generate", headers=headers).headers
        assert "access-control-allow-origin" not in client.post("/generate", json=BODY, headers=headers).headers
    with serving(checkpoint, cors_origins=("https://example.org",), api_keys=("key",)) as client:
        allowed = client.options("/generate", headers=headers)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        other = client.options("/generate", headers={**headers, "Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


def test_each_request_has_one_line_with_its_timings(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(checkpoint) as client:
        client.post("/generate", json=BODY)
        client.post(
            "/v1/completions", json={**OPENAI_BODY, "prompt": ["The fox", "A bird"], "n": 2, "ignore_eos": True}
        )
        client.post("/generate", json={})
        client.get("/health")
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/generate", 200),
        ("/v1/completions", 200),
        ("/generate", 422),
    ]
    first, second, refused = lines
    assert first["generated_tokens"] == 3
    assert first["finish_reasons"] == ["length"]
    assert 0 <= first["queue_seconds"] <= first["time_to_first_token"] <= first["seconds"]
    assert second["generated_tokens"] == 12
    assert second["finish_reasons"] == ["length"] * 4
    assert "generated_tokens" not in refused


def test_an_unforeseen_error_tells_the_client_nothing(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(checkpoint) as client:
        engine = client.app.state.context.engine  # type: ignore[attr-defined]
        with mock.patch.object(engine, "submit", side_effect=RuntimeError("inner workings")):
            for path, body in (("/generate", BODY), ("/v1/completions", OPENAI_BODY)):
                failed = client.post(path, json=body)
                assert failed.status_code == 500
                assert "The server failed on this request." in failed.text
                assert "inner" not in failed.text
                assert failed.headers["x-request-id"]
    assert "inner workings" in caplog.text


def test_log_formats(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging("json")
        logging.getLogger("server.x").info("request", extra={"seconds": 0.5, "finish_reasons": ["length"]})
        line = json.loads(capsys.readouterr().err)
        assert (line["message"], line["seconds"], line["finish_reasons"]) == ("request", 0.5, ["length"])
        assert (line["level"], line["logger"]) == ("INFO", "server.x")
    finally:
        root.handlers, root.level = before, level
    record = logging.makeLogRecord({"msg": "request", "path": "/a b", "seconds": 0.5, "id": "x"})
    assert TextFormatter("%(message)s").format(record) == 'request path="/a b" seconds=0.5 id=x'


def test_metrics(checkpoint: Path) -> None:
    with serving(checkpoint, model_name="tiny") as client:
        for _ in range(2):
            client.post("/v1/completions", json={**OPENAI_BODY, "n": 2, "ignore_eos": True})
        client.post("/v1/completions", json={**OPENAI_BODY, "max_tokens": 0, "echo": True, "logprobs": 0})
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str, **labels: str) -> float:
        pairs = ",".join(f'{key}="{of}"' for key, of in sorted({**labels, "model_name": "tiny"}.items()))
        return float(values[f"vllm:{name}{{{pairs}}}"])

    assert value("num_requests_running") == value("num_requests_waiting") == value("kv_cache_usage_perc") == 0
    assert value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 8
    assert value("generation_tokens_total") == 12
    assert value("request_success_total", finished_reason="length") == 5
    assert value("e2e_request_latency_seconds_count") == value("request_queue_time_seconds_count") == 3
    assert value("prefix_cache_queries_total") == value("prompt_tokens_total") > 6
    assert 0 < value("prefix_cache_hits_total") < value("prefix_cache_queries_total")
    assert value("request_inference_time_seconds_count") == value("request_params_max_tokens_count") == 3
    assert (value("request_params_n_sum"), value("request_params_max_tokens_sum")) == (5, 6)
    assert value("num_preemptions_total") == 0
    assert value("iteration_tokens_total_sum") >= 8  # a text's first token comes with its prompt
    assert value("cache_config_info", block_size=str(2**20), num_gpu_blocks="32") == 1
    assert values['aft:http_responses_total{status="200"}'] == "3.0"
    assert float(values["process_resident_memory_bytes"]) > 2**20
    assert not [name for name in values if "_created" in name]


def test_traces_go_to_the_collector(checkpoint: Path) -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        with serving(checkpoint, otlp_endpoint=f"http://127.0.0.1:{collector.server_port}") as client:
            parent = f"00-{'a' * 32}-{'b' * 16}-01"
            client.post("/generate", json=BODY, headers={"traceparent": parent})
        collector.shutdown()
    spans = [
        span
        for content in received
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (span,) = spans
    assert span.name == "POST /generate"
    assert span.trace_id.hex() == "a" * 32
    assert span.parent_span_id.hex() == "b" * 16
    attributes = {attribute.key: attribute.value for attribute in span.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 3
    assert attributes["http.response.status_code"].int_value == 200
    assert span.end_time_unix_nano > span.start_time_unix_nano


def test_the_event_loop_goes_on_while_the_engine_ends(checkpoint: Path) -> None:
    stopped: list[bool] = []
    with serving(checkpoint) as client:
        engine = client.app.state.context.engine  # type: ignore[attr-defined]
        stop = engine.stop

        def stop_off_the_loop() -> None:
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            stop()
            stopped.append(True)

        engine.stop = stop_off_the_loop
    assert stopped == [True]


def test_health_and_readiness_part_while_draining(checkpoint: Path) -> None:
    with serving(checkpoint) as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        engine = client.app.state.context.engine  # type: ignore[attr-defined]
        assert client.portal is not None
        client.portal.call(engine.drain, 1.0)
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        engine.stop()
        assert client.get("/health").status_code == 503
        engine.stop = lambda: None


def test_without_keys_the_server_answers_to_its_own_names_only(checkpoint: Path) -> None:
    """A page whose name was made to point at this machine sends that name."""
    ours = ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "aft", "box.local", "a.test")
    foreign = ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "a.test.evil.example", "[", "a.", "x@b.c")
    with serving(checkpoint, allowed_hosts=("a.test",)) as client:
        for host in ours:
            assert client.get("/sessions", headers={"Host": host}).status_code == 200
        for host in foreign:
            for method, path in (("GET", "/sessions"), ("POST", "/v1/completions"), ("GET", "/health"), ("GET", "/ui")):
                refused = client.request(method, path, headers={"Host": host})
                assert refused.status_code == 403, (host, path)
                assert "does not go by the name" in refused.text
    for config in ({"allowed_hosts": ("*",)}, {"api_keys": ("key",)}):
        options: dict[str, Any] = {**config}
        with serving(checkpoint, **options) as client:
            headers = {"Host": "evil.example", "Authorization": "Bearer key"}
            assert client.get("/sessions", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://aft.example"}, True),  # a proxy may change the Host
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "http://testserver"}, True),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://testserver:3000"}, False),
        ({"Origin": "http://testserver.evil.example"}, False),
        ({"Origin": "http://["}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, False),
    ],
)
def test_pages_of_other_origins_change_nothing(checkpoint: Path, headers: dict[str, str], allowed: bool) -> None:
    with serving(checkpoint, cors_origins=("https://friend.example",)) as client:
        made = client.post("/sessions", headers={**headers, "Content-Type": "text/plain"})
        assert made.status_code == (201 if allowed else 403), made.text
        generated = client.post("/v1/completions", headers=headers, json=OPENAI_BODY)
        assert generated.status_code == (200 if allowed else 403)
        session = client.post("/sessions").json()["session_id"]
        assert client.delete(f"/sessions/{session}", headers=headers).status_code == (204 if allowed else 403)
        assert client.get("/info", headers=headers).status_code == 200  # that a page can read it is CORS' to allow


def test_no_answer_is_taken_for_what_it_is_not(checkpoint: Path) -> None:
    with serving(checkpoint, max_body_size=1000) as client:
        answers = [client.get(path) for path in ("/health", "/ui", "/none", "/v1/models", "/metrics", "/docs")]
        answers += [client.post("/generate", json=BODY), client.post("/generate", content=b"x" * 2000)]
        assert all(answer.headers["x-content-type-options"] == "nosniff" for answer in answers)


@pytest.mark.parametrize("path", ["/ui", "/docs"])
def test_a_page_runs_its_own_scripts_only(checkpoint: Path, path: str) -> None:
    with serving(checkpoint) as client:
        page = client.get(path)
        policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
        assert "unsafe" not in str(policy["script-src"] + policy["default-src"])
        for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
            assert policy[name] == "'none'"
        assert "//" not in re.sub(r"<script>.*</script>", "", page.text, flags=re.DOTALL)  # nothing from elsewhere
        for found in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            if not found.startswith("data:"):
                assert client.get(f"/{found}").status_code == 200
    assert client.get("/docs/setup.py").status_code == 404


def test_the_root_is_a_page_for_browsers(checkpoint: Path) -> None:
    with serving(checkpoint, api_keys=("key",)) as client:
        page = client.get("/", headers={"Accept": "text/html,*/*;q=0.8"}, follow_redirects=False)
        assert (page.status_code, page.headers["location"]) == (303, "/ui")
        probe = client.get("/")
        assert (probe.status_code, probe.text) == (200, "")
        assert client.post("/", json=BODY).status_code == 401


def test_head_is_get_without_its_body(checkpoint: Path) -> None:
    with serving(checkpoint) as client:
        for path in ("/", "/health", "/ready", "/v1/models", "/metrics", "/ui", "/openapi.json"):
            answer = client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
        assert client.head("/v1/models").headers["content-length"] == client.get("/v1/models").headers["content-length"]
        assert client.head("/none").status_code == 404
        assert client.head("/generate").status_code == 405


@pytest.mark.parametrize("prefix", ["", "/p/aft"])  # of a proxy that takes it away, and of one that keeps it
def test_a_proxy_may_have_the_server_under_a_path(checkpoint: Path, prefix: str) -> None:
    with serving(checkpoint, root_path="/p/aft", api_keys=("key",), max_body_size=1000) as client:
        assert client.get(f"{prefix}/health").status_code == 200
        root = client.get(f"{prefix}/", headers={"Accept": "text/html"}, follow_redirects=False)
        assert root.headers["location"] == "/p/aft/ui"
        assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/p/aft"}]
        assert set(client.get(f"{prefix}/v1/models").json()["error"]) == {"message", "type", "param", "code"}
        assert client.get(f"{prefix}/v1/models", headers={"x-api-key": "key"}).status_code == 200
        assert client.get("/p/aft2/health", headers={"x-api-key": "key"}).status_code == 404


@pytest.mark.parametrize("root_path", ["aft", "/aft/", "/", "/a b", "//x"])
def test_a_root_path_that_is_none(root_path: str) -> None:
    with pytest.raises(ConfigurationError, match="root_path must be like /aft"):
        APIConfig(root_path=root_path)


def test_a_slash_at_the_end_of_models_is_the_list(checkpoint: Path) -> None:
    with serving(checkpoint) as client:
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()


def test_compressed_bodies_are_refused_as_such(checkpoint: Path) -> None:
    with serving(checkpoint) as client:
        for path in ("/generate", "/v1/completions"):
            content = gzip.compress(json.dumps(BODY).encode())
            headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
            refused = client.post(path, content=content, headers=headers)
            assert refused.status_code == 415
            assert "Content-Encoding must be identity or left out, not 'gzip'." in refused.text
        assert client.post("/generate", json=BODY, headers={"Content-Encoding": "identity"}).status_code == 200


def test_metrics_can_be_protected(checkpoint: Path) -> None:
    paths = ("/metrics", "/openapi.json", "/docs", "/docs/swagger-ui.css")
    for protect in (False, True):
        with serving(checkpoint, api_keys=("key",), protect_metrics=protect) as client:
            for path in paths:
                assert client.get(path).status_code == (401 if protect else 200)
                assert client.get(path, headers={"x-api-key": "key"}).status_code == 200
            assert client.get("/ready").status_code == client.get("/ui").status_code == 200
