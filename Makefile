# The first `make serve` or `make test` makes .venv and installs into it; later ones start at once.
#   make serve ARGS="--port 9000"      options of `ep serve deepseek-v3`
#   make test  ARGS="-k router -x"     options of pytest

PYTHON ?= python3
BIN    := .venv/bin

.PHONY: serve test test-long lint setup

serve: setup
	@exec $(BIN)/ep serve deepseek-v3 $(ARGS)

# What may run beside other tests on all cores, then those that start servers, one after the other.
test: lint
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -q -n auto -m "beside or not serving" tests/unit tests/serving
	@$(BIN)/python -m pytest -m "not long and not beside" tests/serving tests/gpu
endif

# Further servers, which would take `make test` past its time.
test-long: setup
	@$(BIN)/python -m pytest -m long tests/serving

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup:
	@PYTHON=$(PYTHON) .ci/setup.sh
