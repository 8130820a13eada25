# The whole project from a fresh clone: `make demo` shows what it does, `make test` proves it.
# PYTHON=... chooses the interpreter for .venv (3.11 or newer).
.PHONY: help demo test check fix wheel clean
export PYTHON

help:
	@echo "make demo    export, quantize and run the demonstration checkpoint (sets up .venv)"
	@echo "make test    all tests"
	@echo "make check   lint, types, import contracts"
	@echo "make fix     the same, repairing what can be repaired"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove caches and builds (not .venv)"

demo:
	@scripts/setup export
	@.venv/bin/exaone-export demo

test:
	@scripts/test

check:
	@scripts/check

fix:
	@scripts/check --fix

wheel:
	@scripts/setup dev
	@.venv/bin/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
