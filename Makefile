# Every target makes .venv when there is none and starts at once when there is.
TORCH ?= 2.13.0
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/.installed

.PHONY: setup style check test slow gpu demo bench docs

setup: $(READY)

# torch first: whatever build is wanted, the other requirements then keep it.
$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch $(TORCH), csdraft and its tools into .venv (once, minutes)"
	@$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	@$(BIN)/python -m pip install --quiet -e ".[dev,train]"
	@touch $@

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright csdraft scripts

test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu" $(ARGS)

slow: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -m "slow and not gpu" $(ARGS)

gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu tests/gpu $(ARGS)

demo: $(READY)
	$(BIN)/python scripts/demo.py $(ARGS)

bench: $(READY)
	$(BIN)/python scripts/benchmark.py $(ARGS)

docs: $(READY)
	$(BIN)/python docs/build_tables.py
	$(BIN)/python -m pytest -q tests/test_docs.py
