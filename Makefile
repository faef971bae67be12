# Everything a fresh machine needs: a Rust toolchain, Python 3, make. What else the tests use they
# install under target/, or, where they run as root on Debian, with apt-get.
.DEFAULT_GOAL := help
.PHONY: help run demo test lint soak fuzz bench trusted static image clean

# In a directory of its own: other features would make the next `cargo build` start from nothing.
WITH_REDIS := --features redis --target-dir target/redis

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

run: ## build and serve on 127.0.0.1:8000, or SSE_LISTEN; then prints how to try it
	cargo build --release
	@exec python3 tests/demo/serve.py

demo: target/venv ## a small web application with a list that is live in every tab; INSTANCES=3
	cargo build --release $(if $(INSTANCES),$(WITH_REDIS))
	INSTANCES=$(INSTANCES) target/venv/bin/python tests/demo/run.py

test: tools target/venv target/tools/bin/geckodriver ## every test
	cargo test --no-fail-fast
	cargo test --no-fail-fast $(WITH_REDIS) --test redis
	cargo build
	target/venv/bin/python -m pytest tests/python -q

lint: ## formatting, clippy with and without features, and that it builds for macOS
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --all-features -- -D warnings
	@if rustup target add x86_64-apple-darwin; then \
	  set -x; cargo check --target x86_64-apple-darwin; \
	elif [ "$$CI" = true ]; then \
	  echo "under CI nothing is skipped: the check for macOS needs rustup" >&2; exit 1; \
	else \
	  echo "SKIPPED: the check for macOS, which needs rustup" >&2; \
	fi

soak: ## ten minutes of subscribers coming and going, every stream checked; or REDIS=1
	SSE_SOAK_SECONDS=$(or $(SECONDS),600) cargo test --release \
	  $(if $(REDIS),$(WITH_REDIS) --test redis in_a_long_run,--test soak) -- --nocapture

fuzz: target/tools/bin/cargo-fuzz ## coverage-guided fuzzing of tokens and request targets
	mkdir -p target/fuzz/corpus-token target/fuzz/corpus-target
	for target in token target; do RUSTC_BOOTSTRAP=1 target/tools/bin/cargo-fuzz fuzz run \
	  --fuzz-dir tests/fuzz --target-dir target/fuzz $$target target/fuzz/corpus-$$target \
	  tests/fuzz/seeds/$$target -- -max_total_time=$(or $(SECONDS),60) -timeout=10 \
	  -artifact_prefix=target/fuzz/$$target- || exit 1; done

bench: tools ## the fan-out benchmark against others; ARGS=scale: up to 15,000 streams
	cargo build --release $(WITH_REDIS)
	cargo bench --bench fanout -- $(ARGS)

trusted: ## what the compiler reads of dependencies: lines, and how often they say unsafe
	cargo build --release
	python3 tests/trusted.py

static: ## a static binary at target/static/sse-server; TARGET=aarch64-unknown-linux-musl FEATURES=redis
	TARGET=$(TARGET) FEATURES=$(FEATURES) sh tests/ship/static.sh

image: static ## an image FROM scratch, with docker or podman
	sh tests/ship/image.sh

clean: ## remove all that was built or installed here
	rm -rf target

target/venv: tests/python/requirements.txt
	python3 -m venv target/venv
	target/venv/bin/pip install -q -r tests/python/requirements.txt
	@touch target/venv

# Debian has no geckodriver; without it the tests of Firefox say that they are skipped.
target/tools/bin/geckodriver:
	-command -v firefox-esr firefox >/dev/null && cargo install -q geckodriver --version 0.37.1 \
	  --locked --debug --root target/tools

target/tools/bin/cargo-fuzz:
	cargo install -q cargo-fuzz --version 0.13.2 --locked --debug --root target/tools

.PHONY: tools
tools:
	@sh tests/tools.sh
