# `make` prints the targets. Everything happens inside .venv, which setup and demo create.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
# Old releases of ONNX Runtime that emitted files are tried in; where one cannot be installed, its tests are skipped.
RELEASES ?= 1.15.1 1.17.3

.DEFAULT_GOAL := help
.PHONY: help setup check test nightly bench docs demo clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## create .venv with everything that the other targets need

check: $(VENV)/.dev ## lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: $(VENV)/.dev $(RELEASES:%=$(VENV)/onnxruntime-%/.done) ## run the test suite
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal -q

nightly: $(VENV)/.dev ## run what is too long for every change, and thousands of random networks
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal -q -m nightly
	$(PYTHON) benchmarks/hostile.py 2000 --files 100 --faults 100

bench: $(VENV)/.dev ## run the benchmarks and print their tables
	@for script in $(filter-out benchmarks/run.py benchmarks/mutants.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PYTHON) $$script || exit 1; done

docs: $(VENV)/.dev ## build the documentation into site/, and run its code blocks
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet
	$(PYTHON) -m pytest -n $(WORKERS) -q tests/test_docs.py tests/test_pages.py
	@echo "to read it: $(PYTHON) -m http.server --directory site"

demo: $(VENV)/.demo ## train a small network on handwritten digits and compress it
	$(PYTHON) examples/digits.py
	$(VENV)/bin/compress digits.pt2 --passes merge,prune,int8 --calib digits.npz --eval digits-test.npz

clean: ## delete .venv, caches and what the demo wrote
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache *-compressed
	rm -f digits.pt2 digits.npz digits-test.npz

$(VENV)/.dev: pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing the project and its tools into $(VENV) (a few minutes the first time)"
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing the project into $(VENV) (a few minutes the first time)"
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/onnxruntime-%/.done: | $(PYTHON)
	@$(PYTHON) -m venv $(@D) && \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime==$* 'numpy<2' && touch $@ || \
	    { rm -rf $(@D); echo "ONNX Runtime $* cannot be installed here: its tests are skipped"; }

# The first Python 3.10 or newer on the path. (Order-only above: an updated system Python reinstalls nothing.)
$(PYTHON):
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	        $$python -m venv $(VENV) && exit 0; \
	        rm -rf $(VENV); \
	        echo "error: $$python cannot create .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	    fi; \
	done; \
	echo "error: no Python 3.10 or newer on the path" >&2; exit 1
