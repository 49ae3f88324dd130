# llm_cht on a CUDA machine. Untested: no container could be built where this was written.
#   docker build -t llm-cht .
#   docker run --gpus all -v "$PWD/runs:/workspace/runs" llm-cht llm-cht train configs/quickstart.yaml
#
# The torch wheels carry CUDA 13.0, cuDNN and NCCL themselves, so the small "base" image is enough; the driver comes from
# the host. A C compiler and the Python headers are there for torch.compile (triton).
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace
COPY constraints.txt ./
# torch alone first: its layer is gigabytes and survives a change of our code. A test compares the version.
ARG TORCH_VERSION=2.13.0
RUN pip install --no-cache-dir --constraint constraints.txt "torch==${TORCH_VERSION}"

COPY pyproject.toml README.md LICENSE ./
COPY llm_cht llm_cht
COPY configs configs
COPY launch launch
COPY eval eval
RUN pip install --no-cache-dir --constraint constraints.txt ".[deepspeed]"

CMD ["llm-cht", "--help"]
