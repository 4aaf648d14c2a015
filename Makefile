# make run    trains on the handwritten digits; CONFIG=configs/image_folder.toml trains on images of yours
# make test   runs every test, in random order; PYTEST_ARGS="-m 'not tensorflow'" runs some
# make chaos  kills a thousand worker processes, tries every way a trainer may end, storms the metrics server, and reads
#             random sources for 20 minutes (STRESS_SECONDS=60: for one)
# make lint   ruff and mypy
# make bench  measures every part against the limits of this machine, and against peers
# make clean  removes what these have made
#
# Only Python 3.11 (or newer), pip, make and git are needed; `make test` as root also installs Debian's Prometheus and
# Chromium. The first call of a target makes a virtual environment in .venv, or VENV=..., and installs into it what the
# target needs; later calls take seconds.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/digits.toml
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: run test chaos lint bench clean

run: $(VENV)/.demo
	$(BIN)/input-workers train $(CONFIG)

test: $(VENV)/.dev $(VENV)/.programs
	$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: $(VENV)/.dev
	$(BIN)/python -m pytest -o python_files="chaos_*.py" tests/chaos $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	for part in core streams processes loader keras auto device; do $(BIN)/input-workers bench $$part; done

# One stamp for each set of packages. The build tools are pinned too, so they come first and nothing else builds.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.tools pyproject.toml
	@echo "installing into $(VENV)"
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	touch $@

# Tests that drive Prometheus or a browser are skipped where these cannot be installed, which only root can; under CI they fail.
$(VENV)/.programs: $(VENV)/.tools .ci/programs
	if .ci/programs; then touch $@; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
