# A peer in a container.
#
#   docker build -t shoal .                              CPU (default)
#   docker build -t shoal:cuda --target cuda .           NVIDIA GPUs: docker run --gpus all ...
#   docker run -v shoal:/data -p 31337:31337 -p 31338:31338 -p 8470:8470 shoal join INVITE --announce MY-ADDRESS
#   docker stop -t 60 NAME                               time to hand experts over; Docker's own 10 seconds can be too few
#
# The key, and with it the peer's place in the run, is in the volume: keep it. The status page and metrics are open to
# whoever reaches 8470; publish it as 127.0.0.1:8470:8470 to keep them to this machine.
#
# A package index of your own: --secret id=pip_conf,src=pip.conf --build-arg TORCH_INDEX= (then that index decides which
# build of torch it is). Nothing of it stays in the image. deploy/test_image builds and tries the result.

# To build the very same image again, name the base by its digest: --build-arg BASE=python@sha256:...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS base
ENV PATH=/opt/shoal/bin:$PATH

FROM base AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# fastecdsa comes as source only.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev libgmp-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python3 -m venv /opt/shoal
# Only what decides the dependencies, so that a change of the sources does not install them again.
COPY pyproject.toml constraints.txt ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt

# What installs the last part and writes the bill of materials; not in the image.
FROM builder AS tools
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv /opt/tools && /opt/tools/bin/pip install cyclonedx-bom==7.5.0

FROM builder AS dependencies-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch first, from where its CPU build is; the version is constrained, and the CPU build of it ranks above the other.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
 && pip install -c constraints.txt -r requirements.txt \
 && pip check && pip uninstall -y pip \
 && cd /opt/shoal/lib/python3*/site-packages \
 && rm -rf torch/include torch/test \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find bitsandbytes -name 'libbitsandbytes_*.so' ! -name 'libbitsandbytes_cpu.so' -delete

FROM builder AS dependencies-cuda
ARG TORCH_CUDA_INDEX=
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    pip install -c constraints.txt ${TORCH_CUDA_INDEX:+--extra-index-url "$TORCH_CUDA_INDEX"} torch \
 && pip install -c constraints.txt -r requirements.txt \
 && pip check && pip uninstall -y pip \
 && cd /opt/shoal/lib/python3*/site-packages \
 && rm -rf torch/test \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find bitsandbytes \( -name 'libbitsandbytes_rocm*.so' -o -name 'libbitsandbytes_xpu*.so' \) -delete

FROM builder AS wheel
COPY . .
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    pip wheel --no-deps --wheel-dir /dist .

# Everything but torch and its company: what both targets share.
FROM base AS runtime
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libgmp10 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 shoal \
 && useradd --uid 10001 --gid shoal --home-dir /data --no-create-home --shell /usr/sbin/nologin shoal \
 && install -d -o shoal -g shoal -m 0700 /data
# USER and HOME also serve a `docker run --user` that the image has no name for.
ENV USER=shoal HOME=/data PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    SHOAL_HOME=/data SHOAL_DATA_DIR=/data SHOAL_LOG_FORMAT=json \
    SHOAL_HTTP_HOST=0.0.0.0 SHOAL_HTTP_PORT=8470 SHOAL_DHT_PORT=31337 SHOAL_TRANSPORT_PORT=31338
WORKDIR /data
VOLUME /data
# Status page, metrics and health; directory and averaging; gossip and experts.
EXPOSE 8470/tcp 31337/tcp 31338/tcp
STOPSIGNAL SIGTERM
# In the run, not only alive; http.client because urllib would obey a proxy setting.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 CMD ["python3", "-c", "import http.client, os, sys; peer = http.client.HTTPConnection('127.0.0.1', int(os.environ['SHOAL_HTTP_PORT']), timeout=4); peer.request('GET', '/readyz'); sys.exit(peer.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "shoal"]
CMD ["--help"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Shoal" \
      org.opencontainers.image.description="A peer-to-peer node for training Mixture-of-Experts language models in a swarm." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-cuda /opt/shoal /opt/shoal
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/tools/bin/pip --python /opt/shoal/bin/python3 install --no-deps --no-index --root-user-action ignore /dist/*.whl \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible -o /opt/shoal/sbom.cdx.json /opt/shoal/bin/python3
USER 10001:10001

# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/shoal /opt/shoal
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/tools/bin/pip --python /opt/shoal/bin/python3 install --no-deps --no-index --root-user-action ignore /dist/*.whl \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible -o /opt/shoal/sbom.cdx.json /opt/shoal/bin/python3
USER 10001:10001
