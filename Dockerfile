# The environment of a GPU node: `docker build -t tidar .`; docs/cluster.md ("Containers") says how
# Slurm starts it. Jobs run the checkout that they are submitted from, with this image's packages.
FROM python:3.12-slim-bookworm

# gcc: Triton compiles what it launches. git: runs record the commit that trained them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tidar
COPY . .
# The torch of constraints.txt brings CUDA along. For another CUDA: --build-arg TORCH_INDEX=URL, the
# index of PyTorch's own wheels for it.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch numpy \
    && pip install --no-cache-dir --constraint constraints.txt --editable '.[eval]'
ENV TIDAR_PYTHON=python
