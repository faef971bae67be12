#!/bin/sh
# Leaves a stripped binary that needs no library of the system at target/static/sse-server; for another
# processor with TARGET=aarch64-unknown-linux-musl, and for several instances with FEATURES=redis.
set -eu
cd "$(dirname "$0")/../.."
musl=${TARGET:-$(uname -m)-unknown-linux-musl}
binary=target/static/sse-server

# musl is made for this, but its standard library has to be installed: rustup target add.
# Without it glibc does nearly as well: only a host name in SSE_LISTEN then needs a glibc of the same
# version where the binary runs, which is what the linker's warning is about. Under CI nothing takes
# the place of what is to be tested.
if [ -d "$(rustc --print target-libdir --target "$musl" 2>/dev/null)" ]; then
    target=$musl
elif [ "${CI:-}" = true ] || [ -n "${TARGET:-}" ]; then
    echo "the standard library for it is missing: rustup target add $musl" >&2 && exit 1
else
    target=$(rustc -vV | sed -n 's/^host: //p')
fi

# Rust's own linker knows every processor; the system's knows one.
case $target in
    "$(uname -m)"-*) ;;
    *) export "CARGO_TARGET_$(echo "$target" | tr a-z- A-Z_)_LINKER=rust-lld" ;;
esac

# In a directory of its own: other flags would make the next `cargo build` start from nothing.
RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --release --locked ${FEATURES:+--features "$FEATURES"} \
    --target "$target" --target-dir target/static-build
mkdir -p target/static
install -m 755 "target/static-build/$target/release/sse-server" "$binary"

# Proof: neither the flag nor the target are, where a toolchain has its own idea of them.
# ldd fails for some static binaries and not for others, so what counts is what it says.
linking=$(LC_ALL=C ldd "$binary" 2>&1) || true
case $linking in
    *"statically linked"* | *"not a dynamic executable"* | *"Not a valid dynamic program"*) ;;
    *) echo "$binary is not static: $linking" >&2 && exit 1 ;;
esac
sections=$(readelf --sections --wide "$binary")
case $sections in
    *.symtab* | *.debug_*) echo "$binary is not stripped" >&2 && exit 1 ;;
esac
size=$(wc -c <"$binary")
echo "$binary: static, stripped, for $target, $size bytes ($(((size + 1023) / 1024)) KiB)"
