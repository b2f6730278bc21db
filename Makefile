# The first `make serve` or `make test` makes .venv and installs into it; later ones start at once.
#   make serve ARGS="--port 9000"      options of `ep serve deepseek-v3`
#   make test  ARGS="-k router -x"     options of pytest

PYTHON ?= python3
BIN    := .venv/bin

.PHONY: serve test lint setup

serve: setup
	@exec $(BIN)/ep serve deepseek-v3 $(ARGS)

test: lint
	@$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup:
	@PYTHON=$(PYTHON) .ci/setup.sh
