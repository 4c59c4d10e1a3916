# tapfm on one NVIDIA GPU, at the versions of constraints.txt.
#
#     docker build -t tapfm .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" tapfm check --config my.yaml
#
# Slides, tables and runs are what is mounted at /work. torch brings its own CUDA libraries, so the
# base has the driver's hooks alone.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/tapfm
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c /opt/tapfm/constraints.txt '/opt/tapfm[excel]'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["tapfm"]
CMD ["--help"]
