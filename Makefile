# Two commands do everything, each with its own set-up, on a machine with only Python 3.11 and make:
#   make demo     trains the demo model on real text and writes runs/demo/report.html
#   make test     runs every check

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough; override with PYTHON=...
PYTHON = $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)
TEST_PROCESSES := 2
# What is installed for the checks; `dev,ray` adds the tests of replicas.
EXTRAS := dev

RUN_STAMP := $(VENV)/installed-run
DEV_STAMP := $(VENV)/installed-$(EXTRAS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint browser clean

help:
	@echo "make demo [minutes=5] [data=DIR] [out=DIR]   train the demo model on real text, write a report"
	@echo "make test [EXTRAS=dev,ray]                   every check: style, types, layers, tests; of replicas too"
	@echo "make lint                                    the checks that run nothing"
	@echo "make clean                                   remove the virtual environment and caches; runs/ stays"

demo: $(RUN_STAMP)
	$(BIN)/leadline demo $(if $(minutes),"minutes=$(minutes)") $(if $(data),"data=$(data)") $(if $(out),"out=$(out)")

# pytest comes last: its summary is the last line of the run. One thread each: the processes share the cores.
test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/size_report.py

# The tests of the web page run in the Chromium of the system.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo "make: no Chromium was found, and the web page is tested in it; on Debian: apt-get install chromium" >&2; \
		exit 1; }

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Files that an install depends on. A stamp is written last, so an interrupted install starts again.
PINS := pyproject.toml constraints.txt leadline/__init__.py

$(RUN_STAMP): $(PINS)
	$(call install,.)
	touch $@

$(DEV_STAMP): $(PINS)
	$(call install,.[$(EXTRAS)])
	touch $(RUN_STAMP) $@

define install
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef
