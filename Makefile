# `make demo` and `make test` need Python 3.11 or newer, pip and make; each makes its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-all export clean
demo: .venv/demo.done
	$(BIN)/g2rpo demo $(ARGS)

# Tests share the cores as processes of one thread each; those that share runs stay together.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup

test: .venv/dev.done
	$(PYTEST) tests $(ARGS)

# The long ones besides: committed results, rehearsals, the fault campaign, memory against measured peaks.
test-all: test
	$(PYTEST) -m slow tests $(ARGS)

export: .venv/dev.done
	$(BIN)/python scripts/links.py
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python scripts/readme.py

.venv/pip.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "g2rpo needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

# Only the model file of rapidocr-onnxruntime is used, so neither its dependencies nor its limit on Python matter.
INSTALL = $(BIN)/pip install --quiet -c constraints.txt
OLDER_READER = $(INSTALL) --no-deps --ignore-requires-python rapidocr-onnxruntime

.venv/demo.done: .venv/pip.done pyproject.toml constraints.txt
	$(INSTALL) -e '.[ocr]'
	$(OLDER_READER)
	@touch $@

.venv/dev.done: .venv/pip.done pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	$(OLDER_READER)
	@touch $@ .venv/demo.done

clean:
	rm -rf .venv build *.egg-info
