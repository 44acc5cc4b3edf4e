# The image of a run on Kubernetes, or wherever containers run: docker build -t registry.example/nsa-dist:TAG .
# PyTorch's wheels bring CUDA's libraries; the driver is the host's. It has not been built yet (docs/how-to/cluster.md).
FROM python:3.12-slim-bookworm

# gcc: Triton compiles a small C file for each kernel. ibverbs: NCCL over RDMA. wget: KubeRay's own probes, if you use them.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev ibverbs-providers libibverbs1 wget \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nsa_dist nsa_dist
COPY kernels kernels
COPY launchers launchers
RUN pip install --no-cache-dir --constraint constraints.txt ".[ray]"
COPY configs configs

RUN useradd --create-home --uid 1000 nsa
USER nsa
CMD ["nsa-dist", "doctor"]
