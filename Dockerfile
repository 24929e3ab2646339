# fastkd with everything that it needs, on a CPU or an NVIDIA GPU. torch's packages bring CUDA's libraries with them.
#
#   docker build -t fastkd .
#   docker build -t fastkd --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg PIP_EXTRA_INDEX_URL= .
#   docker run --rm -v "$PWD:/work" fastkd doctor
#   docker run --rm -v "$PWD:/work" --gpus all --ipc host fastkd train mine.yaml
ARG BASE=ubuntu:24.04
FROM ${BASE}

# ffcv is compiled; torch.compile needs the compiler at run time, too.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fastkd
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fastkd fastkd
COPY recipes recipes
COPY writers writers

ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt --upgrade pip \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt --build-constraint constraints.txt \
        '.[bench,digits,export,tensorboard,timm]'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["fastkd"]
CMD ["--help"]
