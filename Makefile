# `make demo` and `make test` need Python 3.11 or newer with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo

READY = $(VENV)/.ready
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: help setup demo test lint format docs sbom audit clean

help:
	@echo "make demo    simulate a telescope, run everything on it, end with the path of the report"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make docs    write docs/cli.md and docs/settings.md from the program"
	@echo "make sbom    write sbom.json: every package and its licence, as CycloneDX"
	@echo "make audit   ask for known vulnerabilities of the pinned versions (needs PyPI's JSON interface)"
	@echo "make clean   remove what the above made"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Exit code 4 means that everything is there already.
demo: $(READY)
	test -e $(DEMO)/telescope/truth.parquet || $(VENV)/bin/rayscan simulate $(DEMO)/telescope --months 2 --sources 1500 --flows 300000
	$(VENV)/bin/rayscan run --workspace $(DEMO)/workspace --preset quick \
	  --set captures.paths=$(DEMO)/telescope/captures || test $$? -eq 4

# Two processes: much of a test's time goes by while a Ray starts. A module stays in one of them, since what
# it prepares for its tests takes longer than they do; conftest.py says in which order modules come.
test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(READY)
	$(VENV)/bin/python docs/generate.py

# The tools have an environment of their own: what is looked at must not hold what looks.
TOOLS = $(VENV)-tools

$(TOOLS)/.ready: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

sbom: $(READY) $(TOOLS)/.ready
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --of JSON -o sbom.json $(VENV)/bin/python

# --strict: a package of which nothing could be learnt is no good news.
audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) $(TOOLS) sbom.json $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
