# phauld in a container: Debian 13 with the package of debian/. It moves what it started, or restored, in its own PID
# namespace, and its trees end with it. docs/packaging.md says what each capability is for, and what was measured.
#   docker build -t phaul .
#   docker run --network host --cap-drop ALL \
#     --cap-add DAC_OVERRIDE --cap-add KILL --cap-add NET_ADMIN --cap-add SETGID \
#     --cap-add SETPCAP --cap-add SETUID --cap-add SYS_ADMIN --cap-add SYS_CHROOT \
#     --cap-add SYS_NICE --cap-add SYS_PTRACE --cap-add SYS_RESOURCE --cap-add SYS_TIME \
#     --security-opt seccomp=unconfined --security-opt apparmor=unconfined --shm-size 8g phaul
# Without a network: --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels --volume DIRECTORY:/wheels
FROM debian:trixie-slim AS build
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
RUN apt-get update && apt-get install -y --no-install-recommends debhelper python3-pycriu python3-venv
COPY . /build/phaul
RUN cd /build/phaul && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps

FROM debian:trixie-slim
RUN --mount=type=bind,from=build,source=/build,target=/build \
    apt-get update \
    && apt-get install -y --no-install-recommends /build/phaul_*.deb rsync \
    && rm -rf /var/lib/apt/lists/*
RUN criu --version && phaul --version
ENTRYPOINT ["tini", "--", "phauld"]
