# Qatapult for CUDA nodes (A100 and newer). docs/docker.md tells how to build, run and convert it.
#
# The base is plain Python: torch's wheels bring the CUDA libraries, the host brings the driver.
ARG PYTHON_IMAGE=python:3.12.8-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc g++ && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt pyproject.toml ./
COPY launch/install_image.sh launch/
RUN launch/install_image.sh dependencies /opt/qatapult
COPY setup.py README.md LICENSE ./
COPY kernels kernels
COPY trainer trainer
COPY launch launch
COPY configs configs
RUN launch/install_image.sh project /opt/qatapult

FROM ${PYTHON_IMAGE} AS run
# gcc stays: Triton compiles the C stub that launches each kernel, and inductor's CUDA code goes through Triton.
# g++, nvcc and CUDA's headers do not. The rdma libraries are what NCCL speaks InfiniBand with.
# The base image's tag pins the Debian release; packages within it take their security updates.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers librdmacm1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 qatapult
COPY --from=build /opt/qatapult /opt/qatapult
ENV PATH=/opt/qatapult/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/qatapult
HEALTHCHECK --interval=60s --timeout=60s --start-period=60s CMD ["qatapult", "doctor", "--quick"]
ENTRYPOINT ["qatapult"]
CMD ["--help"]
