# make demo, make test: from nothing to a result. PYTHON=python3.12 make test picks the interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint bench build clean

demo: $(VENV)/installed
	$(VENV)/bin/sparsekern demo

test: lint
	$(PY) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

bench: $(VENV)/installed
	$(PY) -m pytest bench

build: $(VENV)/installed

# the build tools come from constraints.txt too, so the build needs no environment of its own
$(VENV)/installed: $(BUILT_FROM)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools pybind11 ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	@$(PY) -c 'from sparsekern.ops import compiled; print(*(f"sparsekern._{n}: {compiled.why_not(n) or compiled.how_built(n)["compiler"]}" for n in ("cpu", "cuda")), sep="\n")'
	touch $@

clean:
	rm -rf build $(VENV)
