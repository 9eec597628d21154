# The server. For a CPU:        docker build -t compactor-vllm .
#             for NVIDIA GPUs:  docker build -t compactor-vllm --build-arg DEVICE=cuda .
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim

ARG DEVICE=cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Triton compiles the code that launches its kernels with a C compiler.
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

# PyTorch comes first: it is the largest layer and changes the least.
RUN case "$DEVICE" in \
        cpu) pip install --retries 1 --extra-index-url "$TORCH_INDEX" "torch==${TORCH_VERSION}+cpu" ;; \
        cuda) pip install "torch==${TORCH_VERSION}" ;; \
        *) echo "DEVICE must be cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[server]"

RUN useradd --uid 10001 --create-home compactor && install -d -o compactor /cache
USER 10001
WORKDIR /home/compactor

# Models, and kernels that were compiled. Every option of `serve` may be set by a variable: COMPACTOR_MODEL, COMPACTOR_RATIO, ...
ENV COMPACTOR_CACHE=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton COMPACTOR_HOST=0.0.0.0 COMPACTOR_PORT=8000
VOLUME /cache
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health/live' % os.environ['COMPACTOR_PORT'], timeout=4)"]

# The exec form makes the server process 1, so that it gets SIGTERM, and drains.
STOPSIGNAL SIGTERM
ENTRYPOINT ["compactor-vllm", "serve"]
