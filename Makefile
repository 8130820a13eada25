# The whole project from a fresh clone: `make demo` shows what it does, `make test` proves it.
# PYTHON=... chooses the interpreter for .venv (3.11 or newer).
.PHONY: help demo test fuzz check fix build wheel install-check clean
export PYTHON

help:
	@echo "make demo    export, quantize and run the demonstration checkpoint (sets up .venv)"
	@echo "make test    all tests"
	@echo "make fuzz    a million damaged and hostile inputs, half an hour (make test runs some of them)"
	@echo "make check   lint, types, import contracts"
	@echo "make fix     the same, repairing what can be repaired"
	@echo "make build   build the sdist and, from it, the wheel into dist/; make wheel: the wheel alone"
	@echo "make install-check   both into clean environments, newest and oldest versions, every Python there is (minutes)"
	@echo "make clean   remove caches and builds (not .venv)"

demo:
	@scripts/setup export
	@.venv/bin/exaone-export demo

test:
	@scripts/test

fuzz:
	@scripts/setup dev
	@.venv/bin/python -m tests.fuzz $(FUZZ)

check:
	@scripts/check

fix:
	@scripts/check --fix

# Without isolation: what builds is installed by scripts/setup, in the versions of constraints.txt.
build:
	@scripts/setup dev
	@.venv/bin/python -m build --no-isolation

wheel:
	@scripts/setup dev
	@.venv/bin/python -m build --no-isolation --wheel

install-check:
	@scripts/setup dev
	@.venv/bin/python -m benchmarks.installs $(INSTALLS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
