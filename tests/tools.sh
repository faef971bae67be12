#!/bin/sh
# What tests and benchmarks use besides: Debian packages, installed where this runs as root on Debian,
# asked for by name elsewhere. A test that misses one says so, and in CI fails.
packages="curl openssl nginx libnginx-mod-nchan libsodium23 chromium chromium-driver firefox-esr
  haproxy caddy systemd iproute2 iptables util-linux podman cloc nodejs npm redis-server
  php-cli php-curl php-gmp php-msgpack ruby ruby-msgpack ruby-rbnacl
  golang-go golang-golang-x-crypto-dev golang-github-vmihailenco-msgpack.v5-dev"
missing=""
for package in $packages; do
    case $package in
        # May have come from elsewhere.
        nodejs) command -v node ;;
        npm) command -v npm ;;
        curl | openssl | nginx | caddy | cloc | podman | chromium) command -v "$package" ;;
        *) dpkg -s "$package" ;;
    esac >/dev/null 2>&1 || missing="$missing $package"
done
if [ -z "$missing" ]; then
    :
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "Some tests will be skipped. They need these Debian packages:$missing"
fi
# One of the servers that the benchmark runs beside ours.
if [ ! -d target/bench/node_modules/better-sse ] && command -v npm >/dev/null; then
    npm install --silent --no-audit --no-fund --prefix target/bench better-sse@0.16.1
fi
