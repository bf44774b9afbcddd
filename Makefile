# make demo    answer a question about an example picture and draw the answer's boxes
# make test    format, lint, types and tests
# make clean   remove the virtual environment and what the tools left

PYTHON  ?= python3
SYSTEM  := $(shell uname -s)
# MLX's backend: macOS brings its own, Linux names one (make demo BACKEND=cuda).
BACKEND ?= $(if $(filter Darwin,$(SYSTEM)),,cpu)

DEMO_IMAGE  ?= examples/rocket.png
DEMO_REGION ?= --point 275,135
DEMO_PROMPT ?= What is [region0]? Give its box.
DEMO_OUTPUT ?= out/demo.png

VENV := .venv
BIN  := $(VENV)/bin
COMMA := ,
EXTRAS := $(if $(BACKEND),[$(BACKEND)])
TEST_EXTRAS := [test$(if $(BACKEND),$(COMMA)$(BACKEND))]

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO_OUTPUT))
	$(BIN)/python generate.py --image $(DEMO_IMAGE) $(DEMO_REGION) --prompt "$(DEMO_PROMPT)" \
	  --save-image $(DEMO_OUTPUT)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), ferret-mlx needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  "error: $(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created | blas
	$(BIN)/python -m pip install --quiet -e '.$(EXTRAS)'
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.created | blas
	$(BIN)/python -m pip install --quiet -e '.$(TEST_EXTRAS)'
	@touch $@ $(VENV)/.installed

# MLX's Linux CPU wheel links a slow reference BLAS; ferret_mlx loads OpenBLAS over it where it finds one.
.PHONY: blas
blas: $(VENV)/.created
ifeq ($(SYSTEM)-$(BACKEND),Linux-cpu)
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	     && { apt-get update -qq; apt-get install -y -qq libopenblas0-pthread; } >/dev/null; } \
	|| echo >&2 "note: without OpenBLAS everything runs many times slower here (Debian, Ubuntu: sudo apt-get install libopenblas0-pthread; Fedora: sudo dnf install openblas)"
endif

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
