# The commands of this project. Everything is installed into .venv, once.
#   make demo    a real model gets better at a real task, over HTTP
#   make test    the whole test suite
#   make fuzz    ten thousand random bodies, and schemathesis over the whole OpenAPI document
#   make chaos   kills, stops and starves a real service, 40 times; half an hour
#   make load    how fast the service is; needs wrk (apt-get install wrk)
#   make screenshots  the pictures of the page, from a real job; needs chromium
#   make lint    style, types and the directions of imports
#   make clean   remove what was installed and cached; ./data, with models and jobs, stays

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test fuzz chaos load screenshots lint clean

demo: $(INSTALLED)
	@$(BIN)/python -m workers.demo

# Two files at a time, each with one thread: most tests wait for processes that they have started.
test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fuzz: $(INSTALLED)
	@$(BIN)/python -m tests.fuzz

chaos: $(INSTALLED)
	@$(BIN)/python -m tests.chaos --parallel 2

load: $(INSTALLED)
	@$(BIN)/python -m tests.load

screenshots: $(INSTALLED)
	@$(BIN)/python -m tests.screenshots

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# One command for all: torch is then resolved under its pin, and nothing is installed twice.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv; the first time this takes a few minutes ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
