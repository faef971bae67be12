#!/bin/sh
# Makes the image sse-server of the static binary and nothing else.
set -eu
cd "$(dirname "$0")/../.."

engine=
for candidate in docker podman; do
    # A client alone builds nothing: does its engine answer?
    [ -n "$engine" ] || ! $candidate info >/dev/null 2>&1 || engine=$candidate
done
[ -n "$engine" ] || { echo "neither docker nor podman works here" >&2 && exit 1; }

# For podman: its own format has no health check, and within a container it cannot make another.
export BUILDAH_FORMAT=docker BUILDAH_ISOLATION=chroot

# The user by number: an image without /etc/passwd has no names. The check waits longer than
# `ping` does by itself.
$engine build --tag sse-server --file - target/static <<'BUILD'
FROM scratch
COPY sse-server /sse-server
USER 65532:65532
ENV SSE_LISTEN=0.0.0.0:8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s CMD ["/sse-server", "ping"]
ENTRYPOINT ["/sse-server"]
BUILD

size=$($engine image inspect --format '{{.Size}}' sse-server)
echo "image sse-server, made with $engine: $size bytes ($(((size + 1023) / 1024)) KiB)"
