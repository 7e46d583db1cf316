# A peer, a volunteer or a trainer in a container: small (CPU only), without root. docs/containers.md says how it is used.
FROM python:3.12-slim AS build
# libp2p needs fastecdsa, which pip compiles
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgmp-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/lah
ENV PATH=/opt/lah/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY scripts/constraints.txt /src/scripts/
# torch without CUDA: 200 MB instead of 3 GB
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' /src/scripts/constraints.txt)"
COPY . /src
RUN pip install -c /src/scripts/constraints.txt /src

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgmp10 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lah /opt/lah
# /data keeps identity, experts and data sets; through /swarm the peers of one computer learn where the first one is
RUN useradd --create-home --uid 10001 lah && install -d -o lah -g lah /data /swarm
ENV PATH=/opt/lah/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 LAH_DATA=/data
USER lah
WORKDIR /data
VOLUME /data
EXPOSE 4001
STOPSIGNAL SIGTERM
ENTRYPOINT ["lah-nb"]
CMD ["peer", "--listen", "/ip4/0.0.0.0/tcp/4001", "--identity", "/data/peer.key"]
