# `make demo` and `make test` set up everything they need: uv (in .uv, if it is not installed) and
# the locked environment (in .venv). To use your own Python and torch, see docs/install.md.
.PHONY: demo test test-all test-oldest gpu-checks lint setup lock clean

# Use the system certificates, or downloads fail behind a proxy that has certificates of its own.
export UV_SYSTEM_CERTS := 1
# Compile Python's bytecode at installation. With a read-only .venv every start would compile it.
export UV_COMPILE_BYTECODE := 1
UV := $(or $(shell command -v uv),.uv/bin/uv)
LOCK := requirements.lock

demo: setup
	.venv/bin/rekindle demo

# Two processes with one thread each. All tests of a file run in one process; the longest files
# start first.
PYTEST_FLAGS := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := .venv/bin/pytest $(PYTEST_FLAGS)

test: setup
	$(PYTEST)

# Includes the slow tests.
test-all: setup
	$(PYTEST) -m ''

# On the oldest torch that pyproject.toml accepts, with the newest NumPy that the interpreter of its
# Triton supports, in an environment of its own (about 5 GB).
OLDEST := .cache/oldest
test-oldest: setup
	$(UV) venv --quiet --allow-existing --python .venv/bin/python $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST) --editable '.[dev]' 'torch==2.11.*' 'numpy<2.4'
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(OLDEST)/compiled $(OLDEST)/bin/pytest $(PYTEST_FLAGS)

# Checks of the GPU code on a machine without a GPU: the machine code of the Triton kernels, the
# code that Inductor generates for a training step, and the predictions based on it.
gpu-checks: setup
	.venv/bin/python -m benchmarks.hopper --check
	.venv/bin/python -m benchmarks.traffic --check
	.venv/bin/python -m benchmarks.roofline --check
	.venv/bin/python -m benchmarks.scaling --check

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/python -m tests.words

setup: .venv/ready

.venv/ready: $(LOCK) pyproject.toml
	@command -v $(UV) >/dev/null || { echo "setting up uv in .uv"; \
	    python3 -m pip install --quiet --root-user-action ignore --target .uv uv; }
	@echo "setting up the locked environment in .venv (on Linux about 5 GB, most of it CUDA)"
	@test -x .venv/bin/python || $(UV) venv --quiet --python '>=3.11' .venv
	@$(UV) pip sync --quiet --python .venv --require-hashes $(LOCK)
	@$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	@touch $@

# Pins every package with its hashes, for all systems, without the URL of a package index.
lock: pyproject.toml
	$(UV) pip compile --quiet --universal --upgrade --python-version 3.11 --extra dev \
	    --generate-hashes --no-emit-index-url --no-header --output-file $(LOCK) pyproject.toml

clean:
	rm -rf .venv .uv $(OLDEST)
