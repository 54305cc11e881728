# make demo, make test: from nothing to a result. PYTHON=python3.12 make test picks the interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-matrix soak lint bench build clean

demo: $(VENV)/installed
	$(VENV)/bin/sparsekern demo

test: lint
	$(PY) -m pytest

# what touches transformers, with every version that tests/matrix pins and with the one of .venv
MATRIX := $(patsubst tests/matrix/%.txt,%,$(wildcard tests/matrix/*.txt)) pinned
MATRIX_TESTS = $(shell grep -lE 'import transformers|from transformers|tiny_models' tests/test_*.py)

test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-pinned: $(VENV)/installed
	$(PY) -m pytest -q $(MATRIX_TESTS)

test-transformers-%: .matrix/%/installed
	.matrix/$*/bin/python -m pytest -q $(MATRIX_TESTS)

# an environment on top of .venv, so that torch is not there three times
.PRECIOUS: .matrix/%/installed
.matrix/%/installed: tests/matrix/%.txt $(VENV)/installed
	$(PY) -m venv --clear --without-pip .matrix/$*
	$(PY) -c 'import site; print("import site; site.addsitedir(\"" + site.getsitepackages()[0] + "\")")' \
		> "$$(.matrix/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	.matrix/$*/bin/python -m pip --disable-pip-version-check --quiet install -r tests/matrix/$*.txt
	@touch $@

soak: $(VENV)/installed
	$(PY) -m pytest -s tests/soak/soak_*.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

bench: $(VENV)/installed
	$(VENV)/bin/sparsekern bench --config llama-3.2-1b --sparsity 0.5 --layers
	$(VENV)/bin/sparsekern bench --config llama-3.2-1b --sparsity 0.5
	$(PY) bench/model.py --model llama-3.2-1b --pattern 50%

build: $(VENV)/installed

# the build tools come from constraints.txt too, so the build needs no environment of its own
$(VENV)/installed: $(BUILT_FROM)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools pybind11 ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	@$(PY) -c 'from sparsekern.ops.compiled import why_not; \
		[print(f"sparsekern._{name}:", why_not(name) or "built") for name in ("cpu", "cuda")]'
	@touch $@

clean:
	rm -rf build $(VENV) .matrix
