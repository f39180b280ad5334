# syntax=docker/dockerfile:1
# docs/operations.md, "Docker", says how to build and run it.

# By content as well: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Empty. A build context of this name takes its place, a folder of wheels: --build-context wheels=FOLDER
FROM scratch AS wheels

FROM ${BASE} AS builder
# cpu, or cu130 for CUDA 13.0: one of https://download.pytorch.org/whl
ARG VARIANT=cpu
# 1 installs from the wheels alone
ARG PIP_NO_INDEX
ENV PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
# What is installed is in this file, by version and content, but for other builds of PyTorch: of them the version.
# Its headers and its own tests are a quarter of PyTorch.
COPY requirements.lock .
RUN --mount=type=bind,from=wheels,target=/wheels \
    sed ':a;/\\$/{N;s/\\\n//;ba}' requirements.lock > all.txt \
    && grep ^torch== all.txt > torch.txt \
    && index="https://download.pytorch.org/whl/$VARIANT" \
    && if [ "$VARIANT-$(uname -m)" = cpu-x86_64 ]; \
        then pip --python /opt/venv install --no-deps --require-hashes --index-url "$index" --requirement torch.txt; \
        else pip --python /opt/venv install --index-url "$index" "$(grep -o '^torch==[0-9.]*' torch.txt)"; fi \
    && cd /opt/venv/lib/python3.11/site-packages/torch \
    && rm -rf include test bin/*[Tt]est* bin/protoc*
RUN --mount=type=bind,from=wheels,target=/wheels \
    grep -v ^torch== all.txt > requirements.txt \
    && pip --python /opt/venv install --require-hashes --only-binary :all: --requirement requirements.txt
COPY pyproject.toml LICENSE README.md ./
COPY model model
COPY server server
RUN --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/venv wheel --no-deps --no-build-isolation --wheel-dir /dist .

FROM ${BASE}
LABEL org.opencontainers.image.title="aft-server" \
      org.opencontainers.image.description="A text-generation server for Attention Free Transformers" \
      org.opencontainers.image.licenses="Apache-2.0"
# At its first start the server compiles its kernels for the processor that it runs on, and on GPUs Triton compiles too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin aft \
    && install --directory --owner aft --group aft /data
# What changes least comes first, so that new code is a small layer.
COPY --from=builder /opt/venv /opt/venv
COPY weights/aft-conv-stories /models/aft-conv-stories
RUN --mount=type=bind,from=builder,source=/dist,target=/dist \
    pip --python /opt/venv install --no-cache-dir --no-index --no-deps /dist/*.whl
# Compiled kernels are cached below the home.
ENV PATH=/opt/venv/bin:$PATH HOME=/data AFT_HOST=0.0.0.0 AFT_PORT=8000 AFT_MODEL=/models/aft-conv-stories
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Without a proxy, whatever variables the container inherits.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", "import os, urllib.request as r; \
    r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"AFT_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["aft"]
CMD ["serve"]
