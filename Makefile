# `make serve` and `make test` work on a machine that has Python 3.11 or newer; with a C compiler the server is several times as fast.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: clients serve test image-test check format train lock sbom

serve: $(VENV)/.serve  ## start the server on the bundled weights; ARGS="--port 8080 --model DIR"
	$(BIN)/aft serve $(ARGS)

test: check  ## lint, types, all tests, on as many cores as there are up to four
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

image-test: $(VENV)/.test  ## builds the Docker image and tests it; needs docker, or CONTAINER_ENGINE=podman
	$(BIN)/python -m pytest -m image tests/image $(ARGS)

check: $(VENV)/.test  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Where PyTorch's own index cannot be reached: LOCK_FROM="--find-links FOLDER", a folder with its wheel.
LOCK_FROM ?= --torch-backend cpu
lock:  ## requirements.lock: what the image installs, by version and content; needs uv
	uv pip compile pyproject.toml --extra redis --extra tracing $(LOCK_FROM) --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" --upgrade --quiet --output-file requirements.lock

sbom: $(VENV)/.test  ## build/sbom.json: the Python packages of the image, as CycloneDX
	mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom.json

clients: $(VENV)/.test  ## more clients of other servers, for tests/e2e/test_peers_clients.py; node's, if there is npm
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet instructor litellm
	if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(VENV)/clients @huggingface/inference; fi

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.test  ## ARGS="--data FILE --out DIR ..."
	$(BIN)/aft train $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[test]'
	$(PYTHON) -m venv $(VENV)/text-generation  # a client that needs an older huggingface_hub
	$(VENV)/text-generation/bin/pip install --quiet text-generation
	touch $@ $(VENV)/.serve
