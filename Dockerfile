# phauld in a container. It moves processes of its own PID namespace; to move the host's, as a DaemonSet does:
#   docker build -t phauld .
#   docker run --privileged --pid=host --network=host -v /run/phaul:/run/phaul -v /var/lib/phaul:/var/lib/phaul phauld
FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/phaul
COPY requirements.txt /src/
RUN /opt/phaul/bin/pip install --no-cache-dir --disable-pip-version-check -r /src/requirements.txt
COPY . /src
RUN /opt/phaul/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps /src
# Debian's pycriu, and nothing else of Debian's Python packages: criu itself is found on the PATH.
RUN mkdir /opt/phaul/criu \
    && ln -s /usr/lib/python3/dist-packages/pycriu /opt/phaul/criu/pycriu \
    && echo /opt/phaul/criu >"$(/opt/phaul/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/phaul-criu.pth"

FROM debian:trixie-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends criu python3-pycriu tini iproute2 nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/phaul /opt/phaul
ENV PATH=/opt/phaul/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN criu --version && python -c 'from pycriu import rpc_pb2; from phaul.v1 import remote_pb2_grpc'
ENTRYPOINT ["tini", "--", "phauld"]
