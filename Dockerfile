# phauld in a container: Debian 13 with the package of debian/. It moves what it started, or restored, in its own PID
# namespace. Not built by a test yet.
#   docker build -t phaul .
#   docker run --rm --cap-add … phaul              which ones has not been measured
# Without a network: --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels --volume DIRECTORY:/wheels
FROM debian:trixie-slim AS build
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
RUN apt-get update && apt-get install -y --no-install-recommends debhelper python3-venv
COPY . /build/phaul
RUN cd /build/phaul && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps

FROM debian:trixie-slim
RUN --mount=type=bind,from=build,source=/build,target=/build \
    apt-get update \
    && apt-get install -y --no-install-recommends /build/phaul_*.deb \
    && rm -rf /var/lib/apt/lists/*
RUN criu --version && phaul --version
ENTRYPOINT ["tini", "--", "phauld"]
