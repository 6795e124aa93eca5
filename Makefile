# PYTHON= picks the interpreter that .venv is built on, ARGS= is passed on (settings for demo, pytest options for test).
VENV ?= .venv
COMPAT_VENV ?= .venv-compat
ARGS ?=
# What asks Megatron or transformers for numbers, and needs neither vLLM nor a data set.
COMPAT_TESTS = tests/models tests/parallel tests/weights tests/planning/test_activations.py \
	tests/planning/test_state.py tests/fidelity/test_emulation.py tests/fidelity/test_formats.py \
	$(addprefix tests/proofs/test_,against_transformers.py frozen_parts.py layouts.py released_models.py resume_layouts.py \
	without_images.py)
# Only install.sh may see it: everything else runs on the environment's own interpreter.
unexport PYTHON

.PHONY: help install slurm test test-all lint demo chaos test-compat gpu-check

help:
	@echo "make install      build $(VENV): vLLM, Megatron Core, torch for CPU, and this project, editable"
	@echo "make test         install, lint, and the tests that run without a GPU     (ARGS=\"tests/config -k base\")"
	@echo "make test-all     the same with all tests, also those marked extended, one after the other"
	@echo "make demo         install, then train a small Qwen2.5-VL with VPPO        (ARGS=\"rollout.n=4\")"
	@echo "make chaos        kill, cut off and requeue real runs on a SLURM of this machine (ARGS=\"--minutes 30\"; as root)"
	@echo "make lint         ruff and mypy"
	@echo "make test-compat PYTHON=python3.12"
	@echo "                  model and parallel tests with the newest megatron-core, in $(COMPAT_VENV)"
	@echo "make gpu-check    the checks that need a GPU, in $(VENV) or the environment of PYTHON="

install:
	@PYTHON=$(PYTHON) VENV=$(VENV) tools/install.sh

lint: install
	@echo "lint: ruff"
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@echo "lint: mypy"
	@$(VENV)/bin/mypy --no-error-summary

test: lint slurm
	@echo "test: pytest"
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not extended" $(ARGS)

# Says so and goes on where it may not be installed; the tests that need it are skipped there.
slurm:
	@tools/install/slurm.sh || [ $$? = 3 ]

test-all: lint slurm
	@$(VENV)/bin/python -m pytest $(ARGS)

demo: install
	@VENV=$(VENV) PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/digits_cpu/demo.sh $(ARGS)

chaos: install
	@tools/install/slurm.sh
	@PYTHONPATH=tools $(VENV)/bin/python -W ignore -m tests.reliability.chaos $(ARGS)

test-compat:
	@PYTHON=$(or $(PYTHON),python3.12) VENV=$(COMPAT_VENV) tools/install.sh compat
	@$(COMPAT_VENV)/bin/python -m pytest -q $(COMPAT_TESTS) $(ARGS)

gpu-check:
	@$(or $(PYTHON),$(wildcard $(VENV)/bin/python),python3) tools/gpu_check.py $(ARGS)
