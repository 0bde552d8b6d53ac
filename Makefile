# Every target makes the environment when there is none and starts at once when there is.
VENV ?= .venv
TORCH ?= 2.13.0
PYTHON ?= python3
# Exact versions of all packages but torch; `make LOCK= setup` takes the newest that pyproject.toml admits.
LOCK ?= requirements.lock
# More for pip, with LOCK=: `make LOCK= WITH=transformers==5.23.0 setup`.
WITH ?=
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.installed
SITE_READY := $(VENV)/.docs-installed

.PHONY: setup lock style check test slow gpu demo demo-chat bench families docs

setup: $(READY)

# torch first: whatever build is wanted, the other requirements then keep it.
$(READY): pyproject.toml $(LOCK)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH), csdraft and its tools into $(VENV) (once, minutes)"
	@$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
ifeq ($(LOCK),)
	@$(BIN)/python -m pip install --quiet -e ".[dev,train]" $(WITH)
else
	@$(BIN)/python -m pip install --quiet -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --no-deps -e .
endif
	@touch $@

lock:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/make_lock.py $(TORCH) requirements.lock

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python csdraft csdraft_command.py benchmarks examples recipes scripts
	$(BIN)/python -m pytest -q tests/house/test_architecture.py tests/house/test_words.py

test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(ARGS)

slow: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -m "slow and not gpu" $(ARGS)

# Each test's name as it ends: a run that is cut off has told which failed.
gpu: $(READY)
	$(BIN)/python -m pytest -v -m gpu tests/gpu --durations=5 $(ARGS)

demo: $(READY)
	$(BIN)/python -m examples.demo $(ARGS)

# Sized for ten minutes on two cores, without the download of the model (92 MB).
demo-chat: $(READY)
	$(BIN)/python -m examples.demo_chat $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks suites $(ARGS)

# Half an hour on one core; out/families.jsonl keeps what is done, delete it to start again.
families: $(READY)
	$(BIN)/python -m scripts.families --out out/families.jsonl --page docs/families.md $(ARGS)

# The site's builder, beside what `make setup` installs.
$(SITE_READY): $(READY)
	@$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

# Fresh tables, all blocks and the notebook run, all links checked, and the site in site/.
docs: $(READY) $(SITE_READY)
	$(BIN)/python docs/build_tables.py
	$(BIN)/python -m pytest -q tests/house/test_docs.py
	$(BIN)/properdocs build --strict --config-file mkdocs.yml
