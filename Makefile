# Everything runs in .venv, made on first use: a clean checkout needs Python 3.11 to 3.13, git, make.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export OMP_NUM_THREADS := 1

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
TORCH := torch==2.13.0
INSTALLED := .venv/.installed
BIN := .venv/bin
GPU_PYTHON ?= python3
GPU_PYTHON_VERSION ?= 3.12
GPU_NEEDS := pulp==3.3.2 highspy==1.15.1 'pandas>=2.2' 'typer>=0.15' 'pydantic>=2.9,<3' 'platformdirs>=4.3'
GPU_HAS := numpy packaging typing_extensions pyyaml
OUT ?= gpu-check
LOOP ?= local-loop
INPUTS ?= 10000
SLOPES ?= slopes.json
MATRIX ?= 3.11:2.14.1 3.12:2.13.0 3.13:2.13.0
SOURCES := mist tests examples benchmarks cli.py

.PHONY: help plan test coverage test-slow check bench accuracy docs models format mutants golden
.PHONY: validate-exports test-page gpu-check gpu-bundle test-matrix local-loop fuzz

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 was not found on the path." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

plan: $(INSTALLED)  ## plan Llama-3-8B on 16 H100s
	$(BIN)/mist plan examples/llama3_8b.py --gpus 16

test: $(INSTALLED)  ## fast tests
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

coverage: $(INSTALLED)  ## fast tests, counting lines: a quarter slower
	$(BIN)/python -m pytest -m 'not slow' --cov -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## the slow tests
	$(BIN)/python -m pytest -m slow --timeout 900

test-matrix:  ## fast tests on other Pythons and on the newest torch (MATRIX="3.12:2.13.0 ...")
	set -e; for each in $(MATRIX); do \
		venv=.venv-$${each/:/-}; python$${each%:*} -m venv $$venv; \
		$$venv/bin/python -m pip install --quiet "torch==$${each#*:}"; \
		$$venv/bin/python -m pip install --quiet --editable '.[test]'; \
		$$venv/bin/python -m pytest -m 'not slow' -n 2 --dist loadfile; \
	done

check: $(INSTALLED)  ## format, lint, types, import contracts, budgets
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet tests/test_house.py

bench: $(INSTALLED)  ## speed of the planner
	set -e; for f in benchmarks/*.py; do $(BIN)/python "$$f"; done

local-loop: $(INSTALLED)  ## measure this machine, plan, train, compare: two models, 2 and 4 ranks
	set -e; for ranks in 2 4; do for model in llama gpt2; do \
		$(BIN)/python benchmarks/local_loop.py $(LOOP) --model $$model --ranks $$ranks; \
	done; done

gpu-check:  ## the whole loop on one GPU, at most 8 minutes (GPU_PYTHON=, OUT=)
	$(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT)

gpu-bundle: $(INSTALLED)  ## what gpu-check needs beside torch and transformers, as wheels
	$(BIN)/python -m pip download --quiet --dest gpu-bundle --python-version $(GPU_PYTHON_VERSION) \
		--implementation cp --only-binary=:all: --platform any --platform manylinux2014_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 $(GPU_NEEDS)
	cd gpu-bundle && rm -f $(foreach name,$(GPU_HAS),$(name)-*.whl)  # come with the other two
	@du -sm gpu-bundle

accuracy: $(INSTALLED)  ## the fit and docs/accuracy.md from measured runs (RUNS=file.csv, STAGES=file.csv)
	$(BIN)/python benchmarks/calibrations/step_slopes.py $(RUNS) $(SLOPES)
	$(BIN)/python benchmarks/calibrations/fit.py $(RUNS) $(SLOPES)
	$(BIN)/python benchmarks/calibrations/transfers.py $(RUNS) $(SLOPES)
	$(BIN)/python benchmarks/calibrations/accuracy.py $(RUNS) $(STAGES)

docs: $(INSTALLED)  ## what is generated in docs (cli.md, the tree, lists of files)
	$(BIN)/python -m tests.make_docs

models: $(INSTALLED)  ## docs/models.md: trace every preset, example and other family (minutes)
	$(BIN)/python -m tests.make_models

format: $(INSTALLED)  ## format, and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

fuzz: $(INSTALLED)  ## ten thousand inputs that nobody meant; none may end badly (INPUTS=)
	$(BIN)/python -m tests.fuzz.run --inputs $(INPUTS)

mutants: $(INSTALLED)  ## every committed mutant must fail its tests
	$(BIN)/python tests/mutants/run.py

validate-exports: $(INSTALLED)  ## targets' own code reads the exports, three train (slow)
	rm -rf .exports/files .exports/two-steps
	$(BIN)/python -m tests.validate_exports.write .exports/files
	$(BIN)/python -m tests.validate_exports.two_steps .exports/two-steps
	tests/validate_exports/run.sh .exports $(BIN)/python

test-page: $(INSTALLED)  ## reports of the golden plans in headless Chromium (needs node, npm, apt)
	tests/page/run.sh .page $(BIN)/mist

golden: $(INSTALLED)  ## plan the golden plans anew
	$(BIN)/python -m tests.golden
