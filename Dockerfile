# ddfast for CPUs and for NVIDIA's GPUs, from a plain base image (docs/install.md):
#   docker build --target cpu -t ddfast:cpu .
#   docker build --target cuda -t ddfast:cuda --build-arg CUDAARCHS=90a .
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
ENV PATH=/opt/ddfast/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/ddfast \
 && useradd --create-home --uid 1000 ddfast

FROM python AS compilers
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source

FROM compilers AS cpu-wheel
COPY . .
RUN DDFAST_NO_CUDA=1 pip wheel --no-deps --wheel-dir /wheels .

# CUDA's compiler comes as Python packages: the base image needs nothing of NVIDIA's.
FROM compilers AS cuda-wheel
ARG CUDA=13.0
RUN pip install --target /opt/cuda "cuda-toolkit[nvcc,cudart,cccl]==$CUDA.*" \
 && ln -s lib /opt/cuda/nvidia/cu13/lib64
COPY . .
ARG CUDAARCHS=
RUN DDFAST_CUDA=1 CUDA_HOME=/opt/cuda/nvidia/cu13 pip wheel --no-deps --wheel-dir /wheels .

FROM python AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=cpu-wheel /source/constraints/cpu.txt /tmp/
RUN --mount=type=bind,from=cpu-wheel,source=/wheels,target=/wheels \
    pip install --extra-index-url "$TORCH_INDEX" --constraint /tmp/cpu.txt /wheels/*.whl
USER 1000
WORKDIR /home/ddfast
ENTRYPOINT ["ddfast"]
CMD ["doctor"]

# Triton compiles the launches of its kernels where they run: gcc and Python's headers stay.
FROM compilers AS cuda
RUN --mount=type=bind,from=cuda-wheel,source=/wheels,target=/wheels \
    pip install /wheels/*.whl
USER 1000
WORKDIR /home/ddfast
ENTRYPOINT ["ddfast"]
CMD ["doctor"]
