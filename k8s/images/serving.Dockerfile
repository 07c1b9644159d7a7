# Predictor and transformer: `python -m serving.predictor`, `python -m serving.transformer`.
#   docker build -f k8s/images/serving.Dockerfile -t hrnn-meta/serving:0.1.0 .
# Pin the base by digest for production: FROM python:3.11.13-slim-bookworm@sha256:…
FROM python:3.11.13-slim-bookworm
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 HRNN_HOST=0.0.0.0
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
USER 10001:10001
CMD ["python", "-m", "serving.transformer"]
