# `make demo` and `make test` work in a fresh clone with nothing installed but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test check bench gpu assets wheel clean

demo: .venv/runtime
	$(BIN)/aerie generate --prompt "The with statement" --check

# in WORKERS processes of one thread each
test: .venv/test check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/test
	$(BIN)/pytest bench -q -rs --benchmark-json=bench/results/last.local.json
	$(BIN)/python -m bench.report bench/results/last.local.json

# with the Python that is there, into which nothing is installed: torch, triton, transformers, pytest
gpu:
	PYTHONPATH=src:. $(PYTHON) -m bench.gpu

assets: .venv/test
	$(BIN)/python -m aerie.assets.build --out src/aerie/assets

wheel: .venv/test
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf .venv build dist

# constraints.txt holds the tested versions; torch goes first, so that nothing else chooses its build
.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/test: .venv/runtime
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@
