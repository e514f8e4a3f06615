# Everything runs in .venv, made here from requirements.txt by the first target that needs it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
REQUIREMENTS := $(VENV)/.requirements-installed
PACKAGE := $(VENV)/.package-installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-all test-fast bench docs lint matrix sanitize sanitize-calls races wheel clean

help:
	@echo "make demo    train and evaluate the protein aligner of examples/pfam (ARGS=... are passed on)"
	@echo "make test    lint, then the tests and documentation examples (PYTEST_ARGS=... are passed on)"
	@echo "make test-all  likewise, and further combinations of options on interpreted kernels"
	@echo "make test-fast  the tests that are not marked slow, a few minutes on two cores (PYTEST_ARGS=... likewise)"
	@echo "make bench   the tables of benchmarks/ (ARGS=... are passed on)"
	@echo "make docs    the site, into docs/_build (Python 3.11 or later; ARGS=... to sphinx-build)"
	@echo "make lint    ruff and mypy"
	@echo "make matrix  every torch from 2.9 on, each in an environment of its own: docs/releases.md (ARGS=... to nox; an hour)"
	@echo "make sanitize the C++ kernels, instrumented, through the tests of engines (Linux, GCC; some minutes)"
	@echo "make sanitize-calls  likewise, of one instruction set and through calls of its ops that do not fit (CALLS=$(CALLS))"
	@echo "make races   a few problems on many threads under the thread sanitizer (Linux, GCC; some minutes)"
	@echo "make wheel   the sdist and the wheel, into dist/"
	@echo "make clean   remove what building and testing left; .venv stays"
	@echo "PYTHON=...   the Python that .venv is made with, 3.10 to 3.13 (now: $(PYTHON))"

demo: $(PACKAGE)
	$(RUN) -m examples.pfam $(ARGS)

bench: $(PACKAGE)
	for b in benchmarks/*.py; do $(RUN) $$b $(ARGS) || [ $$? = 3 ] || exit 1; done  # 3: no such device here

# The tools are installed once; building needs no network.
docs: $(VENV)/.docs-installed
	rm -rf docs/_build docs/_figures
	$(RUN) -m docs.figures docs/_figures
	$(RUN) -m sphinx -b html -W --keep-going $(ARGS) docs docs/_build
	@echo "the site: docs/_build/index.html"

$(VENV)/.docs-installed: $(PACKAGE) docs/requirements.txt
	@$(RUN) -m pip install --quiet --requirement docs/requirements.txt
	@touch $@

test: lint
	$(RUN) -m pytest -n auto --maxprocesses 8 -m "not exhaustive" $(PYTEST_ARGS)

test-all: lint
	$(RUN) -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

test-fast: $(PACKAGE)
	$(RUN) -m pytest -n auto --maxprocesses 8 -m "not slow" $(PYTEST_ARGS)

lint: $(PACKAGE)
	$(RUN) -m ruff check
	$(RUN) -m mypy

matrix: $(PACKAGE)
	$(RUN) -m nox --noxfile .ci/noxfile.py $(ARGS)

# The interpreter itself is not instrumented, so the runtime is preloaded; what Python and torch never free is theirs.
SANITIZED := build/sanitized/lib
INSTRUMENTED := TORCH_SINKHORN_ATTN_BUILD_CPU=1 TORCH_SINKHORN_ATTN_SANITIZE=address,undefined
WATCHED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(PACKAGE)
	rm -rf build/sanitized
	$(INSTRUMENTED) $(RUN) setup.py -q build --build-lib $(SANITIZED) --build-temp build/sanitized/temp
	$(WATCHED) PYTHONPATH=$(SANITIZED) $(RUN) -m pytest -p no:cacheprovider -o pythonpath="$(SANITIZED) tests" -k cpu \
	    tests/test_conformance.py tests/engines/cpu/test_engine.py tests/engines/cpu/test_ranks.py tests/test_nan.py tests/boundary/test_hostile_calls.py $(PYTEST_ARGS)
	$(WATCHED) PYTHONPATH=$(SANITIZED) $(RUN) -m pytest -p no:cacheprovider -o pythonpath="$(SANITIZED) tests" -k "counts or bits" \
	    tests/engines/cpu/test_threads.py
	$(WATCHED) PYTHONPATH=$(SANITIZED) $(RUN) tests/hostile_calls.py 2000

# Small enough for every change: a third of the code, and no whole suite.
CALLS ?= 400
SANITIZED_CALLS := build/sanitized-calls/lib
sanitize-calls: $(SANITIZED_CALLS)/.built
	$(WATCHED) PYTHONPATH=$(SANITIZED_CALLS) $(RUN) tests/hostile_calls.py $(CALLS)

$(SANITIZED_CALLS)/.built: $(PACKAGE) $(wildcard csrc/*) $(shell find torch_sinkhorn_attn -name '*.py')
	rm -rf build/sanitized-calls
	$(INSTRUMENTED) TORCH_SINKHORN_ATTN_PORTABLE=1 \
	    $(RUN) setup.py -q build --build-lib $(SANITIZED_CALLS) --build-temp build/sanitized-calls/temp
	touch $@

# The thread sanitizer wants addresses where it expects them, hence setarch.
RACES := build/races/lib
races: $(PACKAGE)
	rm -rf build/races
	TORCH_SINKHORN_ATTN_BUILD_CPU=1 TORCH_SINKHORN_ATTN_SANITIZE=thread \
	    $(RUN) setup.py -q build --build-lib $(RACES) --build-temp build/races/temp
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" PYTHONPATH=$(RACES) \
	TSAN_OPTIONS="ignore_noninstrumented_modules=1 suppressions=tests/engines/cpu/tsan.supp exitcode=66" \
	    setarch -R $(RUN) tests/engines/cpu/races.py

wheel: $(PACKAGE)
	rm -rf build
	$(RUN) -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/.incomplete stands while pip works: a set-up cut short is thrown away, not trusted.
$(REQUIREMENTS): requirements.txt
	@if [ -e $(VENV)/.incomplete ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	    echo "Python 3.10 to 3.13 is needed, but $(PYTHON) is '$$($(PYTHON) --version 2>&1)'. Choose one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing requirements.txt into $(VENV); the first time it downloads a few GB (PyTorch with CUDA), in some minutes."
	@mkdir -p $(VENV) && touch $(VENV)/.incomplete
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --requirement requirements.txt
	@rm $(VENV)/.incomplete && touch $@

$(PACKAGE): $(REQUIREMENTS) pyproject.toml setup.py $(wildcard build_backend/*.py) torch_sinkhorn_attn/__init__.py $(wildcard csrc/*)
	@echo "Installing torch_sinkhorn_attn into $(VENV), editable; its C++ kernels take a minute or two to compile."
	@$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
