# The server in a container:
#   docker build -t aria .
#   docker run --gpus all -p 8000:8000 -e ARIA_API_KEY=... -v aria-models:/models aria rhymes-ai/Aria
# Without --gpus it runs on the CPU; without a model it serves the packaged nano. A smaller image for CPUs alone:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t aria .
FROM python:3.12-slim

# Triton compiles a small launcher for its kernels on first use.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch; fi \
    && pip install --no-cache-dir -c constraints.txt ".[serve]" && rm -rf /src/*

RUN useradd --create-home --uid 10001 aria && mkdir /models && chown aria /models
USER aria
WORKDIR /home/aria
ENV HF_HOME=/models TRITON_CACHE_DIR=/models/triton PYTHONUNBUFFERED=1
VOLUME /models
EXPOSE 8000

HEALTHCHECK --start-period=10m --interval=30s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# SIGTERM lets running answers finish: docker stop --time 45
ENTRYPOINT ["aria", "serve", "--host", "0.0.0.0"]
