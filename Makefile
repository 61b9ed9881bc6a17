# make demo       set up, then the demo: real diffusion transformers through every backend that can run here
# make test       set up, then all tests that take seconds
# make test-full  all tests; the result goes to docs/test-full.txt
# make lint       ruff and mypy
# make readme     write the tables of backends and promises into README.md
# make gpu        on a machine with a CUDA GPU: its tests, every promise, kernels at the shapes of real models, the demo
# make bench      what our dispatch costs; the numbers go to out/overhead.json
#
# Everything runs in .venv, set up once and again when pyproject.toml or constraints.txt change.
#   make test PYTHON=/path/to/python     uses that interpreter as it is, and sets nothing up
#   make test PYTHON3=python3.12         makes .venv with that interpreter
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes torch from that index

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test test-full gpu lint readme bench clean

PYTHON3 ?= python3
TORCH_INDEX ?=
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif

# One thread for each of pytest's workers: two workers with all cores each are slower than one.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PYTHON) -m pytest -n 2

# torch comes first and alone, at its pinned version: anything that depends on torch would bring a build of its own
# choice. setuptools comes with it, so that our own package builds without asking an index again.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	.venv/bin/python -m pip install --quiet -c constraints.txt setuptools
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	touch .venv/ready

demo: $(READY)
	$(PYTHON) -m compiled_attn demo

test: $(READY)
	$(PYTEST) -m 'not slow'

test-full: $(READY)
	mkdir -p out
	status=0; $(PYTEST) -ra 2>&1 | tee out/test-full.log || status=$$?; \
	{ $(PYTHON) -m compiled_attn machine; grep -v '%\]$$' out/test-full.log | sed -E 's#/[^ ]*/site-packages/##g'; } > docs/test-full.txt; \
	exit $$status

gpu: $(READY)
	mkdir -p out
	$(PYTHON) -m pytest -m gpu -n 8 -k "not flex" tests compile_tests
	$(PYTHON) -m pytest -m gpu -n 8 tests/test_flex.py compile_tests/test_flex_compile.py
	$(PYTHON) -m compiled_attn list --verify
	$(PYTHON) -m compiled_attn promises --json out/promises.json
	$(PYTHON) -m compiled_attn bench kernels --json out/kernels.json
	$(PYTHON) -m compiled_attn bench ragged --json out/ragged.json
	$(PYTHON) -m compiled_attn bench ragged --ours triton_hopper --forward --pause 0.3 --rounds 3 --repeats 10 \
		--providers triton_hopper _flash_4 _native_cudnn _native_flash --json out/triton_hopper.json
	$(PYTHON) -m compiled_attn bench libraries --json out/libraries.json
	$(PYTHON) -m compiled_attn bench packages --json out/packages.json
	$(PYTHON) -m compiled_attn demo --device cuda --output out/demo

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

readme: $(READY)
	$(PYTHON) -m compiled_attn list --markdown --write README.md
	$(PYTHON) -m compiled_attn promises --markdown docs/promises.json docs/gpu/promises*.json --write README.md

bench: $(READY)
	mkdir -p out
	$(PYTHON) -m compiled_attn bench overhead --json out/overhead.json

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .ruff_cache .mypy_cache
