# `make demo` and `make test` need Python 3.11 or newer, pip and make; each makes its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-all parity export check docs docs-quarto dist clean
demo: .venv/demo.done
	$(BIN)/g2rpo demo $(ARGS)

# Tests share the cores as processes of one thread each; those that share runs stay together.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup

test: .venv/dev.done
	$(PYTEST) tests $(ARGS)

# The long ones besides: committed results, rehearsals, the fault campaign, memory against measured peaks.
test-all: test
	$(PYTEST) -m slow tests $(ARGS)

# HPS-v2.1 as loaded here beside the package that published it: an environment of their own, several GB with torchvision.
PARITY = .venv-parity/bin
parity:
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/pip install --quiet torch torchvision pytest -e '.[rewards]'
	$(PARITY)/pip install --quiet --no-deps hpsv2==1.2.0
	$(PARITY)/python -m pytest -q -rs -m "slow or not slow" tests/rewards/test_scorers.py -k "hps or letterbox or clip"

export: .venv/dev.done
	$(BIN)/python scripts/links.py
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python scripts/readme.py
	$(BIN)/python scripts/docs_quarto.py

# What is committed is what an export gives, and ruff is content.
check: export
	git diff --exit-code
	$(BIN)/ruff check g2rpo nbs tests scripts benchmarks

# `make docs` renders every notebook and the API into _docs/, without network, and fails if a link leads nowhere.
docs: .venv/dev.done
	$(BIN)/python scripts/docs.py

# The same by nbdev and Quarto, for hosted CI: Quarto is in no package registry.
docs-quarto: .venv/dev.done
	$(BIN)/python scripts/docs_quarto.py build/quarto
	$(BIN)/nbdev-docs --path build/quarto

# An sdist and a wheel in dist/; with TAG, only if it is the package's version.
dist: .venv/dev.done
	@$(BIN)/python -c 'import os, sys, g2rpo; tag = os.environ.get("TAG", ""); sys.exit(tag.removeprefix("v") not in ("", g2rpo.__version__) and f"tag {tag} is not the version {g2rpo.__version__}; set __version__ in g2rpo/__init__.py")'
	$(BIN)/python -m build --outdir dist

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
.PHONY: demo test test-all parity export check docs docs-quarto dist clean
