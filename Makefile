# Everything a fresh machine with Python 3.11+ needs: `make demo` runs the main job, `make test` the tests.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: install demo view test test-fast check docs bench paper clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## the virtual environment and what the tool needs

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	@echo "Installing PyTorch and the rest into $(VENV). This downloads a few GB and takes several minutes, once."
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and linters need into $(VENV). This takes a few minutes, once."
	$(PIP) -e '.[dev]'
	touch $@

demo: install  ## decompose the smallest model, harvest its graphs, print the result table (under a minute once installed)
	@echo "1. Train TMS 5-2, and decompose it: half a minute."
	$(PYTHON) -m spd_lightning fit --config tms.yaml
	@echo "2. Compute the attribution graph of every prompt: a few seconds."
	$(PYTHON) -m spd_lightning predict --config tms.yaml
	@echo "3. Print the results of all runs."
	$(PYTHON) -m spd_lightning runs --table
	@echo "See it: make view. For more: source .venv/bin/activate, then python -m spd_lightning --help"

view: install  ## open the viewer in a browser
	$(PYTHON) -m spd_lightning view

test: $(VENV)/.installed-dev  ## the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The options of pyproject.toml check shapes and types at run time, which takes 15 s to start.
test-fast: $(VENV)/.installed-dev  ## a quick part of them, without browsers, killed processes, HuggingFace and checks of shapes
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" -o addopts="-q --strict-markers"

check: $(VENV)/.installed-dev  ## ruff, basedpyright, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-dev  ## the documentation site, in site/
	$(PYTHON) -c "from spd_lightning.store.columns import markdown; print(markdown(), end='')" > docs/tables.md
	$(VENV)/bin/zensical build --clean --strict

bench: $(VENV)/.installed-dev  ## speed, next to a plain implementation of the same maths and the usual storage
	$(PYTHON) benchmarks/bench.py
	$(PYTHON) benchmarks/bench_graphs.py
	$(PYTHON) benchmarks/bench_store.py
	$(PYTHON) benchmarks/bench_statistics.py

paper: install  ## Table 1 of the SPD paper, over seeds, one process a core
	$(PYTHON) benchmarks/paper.py

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) site .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
