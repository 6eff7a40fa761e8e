# make demo: a real encoder and a real generator, before and after ftops.patch      make test: the tests that need no GPU
# Both make their own environment in .venv; Python 3.10 to 3.13 and make are all that must be there.
#   make PYTHON=python3.12 demo     another Python          make test TESTS=tests/demo     some of the tests
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c pins.txt
# The kernels' compiler is only of use where there is a GPU, or to the compile tests; these are in the extra `test`.
comma := ,
DEMO_EXTRAS := $(if $(shell command -v nvidia-smi),demo$(comma)cu13,demo)

.PHONY: demo test test-gpu memcheck bench lint wheel

demo: $(VENV)/demo.installed
	$(BIN)/ftops demo

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(TESTS)

# Races and timings are looked for: one process.
test-gpu: $(VENV)/test.installed
	$(BIN)/python -m pytest -m gpu $(TESTS)

# By NVIDIA's compute-sanitizer, of our kernels alone. Each tensor is an allocation of its own, with room behind it, so that reading past its
# end is seen; what PyTorch tries of the driver's functions is not of interest. (Its racecheck ends in an error of its own on Hopper.)
memcheck: $(VENV)/test.installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --kernel-name kns=numba_kernels --padding 4096 --report-api-errors no \
		--error-exitcode 9 $(BIN)/python -m pytest -m gpu @tests/ops/sanitized.txt

bench: $(VENV)/test.installed
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(VENV)/test.installed
	$(BIN)/ruff check .

wheel: $(VENV)/test.installed
	$(BIN)/python -m build --no-isolation --outdir dist .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "ftops needs Python 3.10 to 3.13; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: pins.txt pyproject.toml setup.py | $(VENV)/bin/python
	@echo "Installing into $(VENV); PyTorch makes this take minutes the first time"
	$(INSTALL) -e '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/test.installed: pins.txt pyproject.toml setup.py | $(VENV)/bin/python
	@echo "Installing into $(VENV); PyTorch makes this take minutes the first time"
	$(INSTALL) -e '.[test]'
	@touch $@
