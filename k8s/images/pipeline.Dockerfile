# Pipeline steps: Kubeflow Pipelines starts them with the command of the compiled pipeline.
#   docker build -f k8s/images/pipeline.Dockerfile -t hrnn-meta/python-pipeline:0.1.0 \
#       --build-arg CODE_DIGEST=$(hrnn code-digest) .
# Pin the base by digest for production: FROM python:3.11.13-slim-bookworm@sha256:…
FROM python:3.11.13-slim-bookworm
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Compute threads that wait soon sleep: on a busy node, or above the container's share of the
# processors, spinning keeps the thread that is waited for from running (docs/results.md, "Stalls").
ENV GOMP_SPINCOUNT=2000
# libgomp: PyTorch links against it, the slim image lacks it.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# Dependencies first: they change less often than the code.
COPY requirements.lock ./
RUN pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY feature_repo feature_repo
COPY components components
COPY serving serving
COPY pipelines pipelines
RUN pip install --no-deps .
# Every step compares the digest of the code in its image with the one that its run was submitted
# for. If the builder says which it expects, an image that lacks a file or holds another version is
# not built at all.
ARG CODE_DIGEST=""
RUN cd / && python -m components.digests ${CODE_DIGEST}
LABEL hrnn-meta.code-digest=${CODE_DIGEST}
USER 10001:10001
CMD ["python", "-m", "pipelines.cli", "--help"]
