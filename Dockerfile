# syntax=docker/dockerfile:1
# InferFlux in a container.
#
#   docker build -t inferflux .                                          CPU and, with a driver, CUDA (PyPI's torch)
#   docker build -t inferflux --build-arg TORCH_INDEX_URL=URL .          torch from another index, such as the CPU-only one
#   docker build -t inferflux --build-arg DEVICE=cuda .                  adds what Triton needs to compile kernels
#   docker run -p 8080:8080 inferflux                                    the demo model; the log shows the key it made
#   docker run -p 8080:8080 -v ./my-model:/models/my-model:ro -e INFERFLUX_MODEL_PATH=/models/my-model inferflux
#
# Runs as user 10001 with a read-only root file system (give it a writable /var/lib/inferflux and /tmp). What Triton
# compiles is kept in /var/lib/inferflux: Docker mounts a tmpfs so that nothing in it can be executed.
ARG PYTHON_VERSION=3.12
ARG DEVICE=cpu

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX_URL=""
WORKDIR /src
RUN python -m venv /opt/inferflux
ENV PATH=/opt/inferflux/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# torch first, in a layer of its own: it is nearly all of the image and seldom changes.
COPY constraints.txt ./
RUN python -m pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY inferflux ./inferflux
RUN python -m pip install --constraint constraints.txt .
# The image has no compiler: its CPU kernels come along, for each level of CPU that it may meet.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN inferflux kernels build --portable

FROM python:${PYTHON_VERSION}-slim AS runtime-cpu

FROM python:${PYTHON_VERSION}-slim AS runtime-cuda
# Triton compiles a launcher for each kernel. Everything else of CUDA comes with torch, the driver with the host.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM runtime-${DEVICE} AS runtime
RUN groupadd --system --gid 10001 inferflux \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/inferflux --shell /usr/sbin/nologin inferflux \
    && mkdir -p /models /var/lib/inferflux /etc/inferflux \
    && chown 10001:10001 /var/lib/inferflux
COPY --from=build /opt/inferflux /opt/inferflux
COPY deploy/docker/server.yaml /etc/inferflux/server.yaml
COPY --chmod=0755 deploy/docker/entrypoint.sh /usr/local/bin/inferflux-entrypoint
ENV PATH=/opt/inferflux/bin:$PATH \
    HOME=/var/lib/inferflux \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/inferflux
VOLUME ["/models", "/var/lib/inferflux"]
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-m", "inferflux.server.health", "--config", "/etc/inferflux/server.yaml"]
ENTRYPOINT ["inferflux-entrypoint"]
CMD ["serve", "--config", "/etc/inferflux/server.yaml"]
