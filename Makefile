# The first `make serve` or `make test` makes .venv and installs into it; later ones start at once.
#   make serve ARGS="--port 9000"      options of `ep serve deepseek-v3`
#   make test  ARGS="-k router -x"     options of pytest

PYTHON ?= python3
BIN    := .venv/bin

.PHONY: serve test test-long lint setup

serve: setup
	@exec $(BIN)/ep serve deepseek-v3 $(ARGS)

# Tests that start servers, one after the other on one worker, and on the others all that may run beside them: a server
# that starts leaves nearly half of two cores idle.
test: lint
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n logical -m "not long" tests/serving tests/unit tests/gpu
endif

# Further servers, which would take `make test` past its time.
test-long: setup
	@$(BIN)/python -m pytest -m long tests/serving

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup:
	@PYTHON=$(PYTHON) .ci/setup.sh
