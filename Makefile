# `make demo` shows what Aria sees in three images; `make test` runs the tests; `make docs` builds the documentation.
# Each makes the environment first, and again only when pyproject.toml or constraints.txt has changed.
#
#   make demo PYTHON=/path/to/python3.12    choose the interpreter (default: the first from 3.11 on)
#   make test ARGS="-k generate"            pass arguments to pytest

VENV := .venv
BIN := $(VENV)/bin
PICTURES := examples/pictures
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
FIND_PYTHON = for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
    python=; done

# Ask the model about an image on the command line, and show both.
ask = @$(BIN)/python examples/preview.py $(PICTURES)/$(1) \
    && printf '\n$$ aria chat --image $(PICTURES)/$(1) "%s"\n' $(2) \
    && $(BIN)/aria chat --image $(PICTURES)/$(1) $(2) && echo

.PHONY: demo test test-slow test-soak test-gpu fuzz test-clients test-clients-fast docs docs-serve nano clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(call ask,word.png,"What does it say?")
	$(call ask,shapes.png,"What is in this picture?")
	$(call ask,emoji.png,"Which emoji is this?")
	@echo 'Your own image: $(BIN)/aria chat --image FILE "What is in this image?"'

test: $(VENV)/.developed
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# Tests of seconds each: several processes, browsers' pages, kernels compiled for GPUs, runs that are killed and resumed.
test-slow: $(VENV)/.developed
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'slow and not soak and not clients and not gpu and not multi_gpu' $(ARGS)

# Tests of minutes each, one at a time: attacks on a server, searches for inputs that break parsers, kernels for all GPUs.
# One folder: make test-soak ARGS=tests/hostile
test-soak: $(VENV)/.developed
	$(BIN)/python -m pytest -n 0 -m soak -s $(ARGS)

# On a machine with GPUs: kernels are compiled instead of interpreted.
test-gpu: $(VENV)/.developed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 0 -m 'gpu or multi_gpu' $(ARGS)

# Fuzz every parser of untrusted input for a minute each; make fuzz ARGS="image --seconds 600"
fuzz: $(VENV)/.developed
	$(BIN)/python -m tests.fuzz.run $(ARGS)

# Real clients of the server in an environment of their own, whose versions tests/clients pins. CI runs the fast ones.
# Those for Node.js are skipped without npm.
CLIENTS := .venv-clients
test-clients: $(VENV)/.developed $(CLIENTS)/.all $(CLIENTS)/.npm
	$(BIN)/python -m pytest tests/clients -rs -m clients $(ARGS)

test-clients-fast: $(VENV)/.developed $(CLIENTS)/.fast $(CLIENTS)/.npm
	$(BIN)/python -m pytest tests/clients -rs -m 'clients and not slow' $(ARGS)

$(CLIENTS)/.all $(CLIENTS)/.fast: $(CLIENTS)/.%: $(CLIENTS)/bin/python tests/clients/%.txt tests/clients/fast.txt tests/clients/constraints.txt
	@echo "Installing clients into $(CLIENTS) ..."
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet -r tests/clients/$*.txt
	@touch $@

$(CLIENTS)/.npm: $(CLIENTS)/bin/python tests/clients/package.json tests/clients/package-lock.json
	if command -v npm >/dev/null; then npm ci --silent --prefix tests/clients; fi
	@touch $@

$(CLIENTS)/bin/python: | $(VENV)/.developed
	$(BIN)/python -m venv $(CLIENTS)

# The documentation as a site in build/site; a warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(VENV)/.documented
	$(BIN)/python -m mkdocs serve

# Train the packaged model again, from collecting its material to the tables of its card: half an hour on a GPU, on Debian 12
# with npm (recipes/nano/README.md describes the steps).
STAGES := 1-language 2-seeing 3-long 4-answers
nano: $(VENV)/.installed
	$(PIP_INSTALL) --quiet --editable '.[train]'
	$(BIN)/python -m recipes.nano.assets.build
	$(BIN)/python -m recipes.nano.text.glosses
	$(BIN)/python -m recipes.nano.train.run --out runs/nano
	for stage in $(STAGES); do \
	    $(BIN)/python -m recipes.nano.eval.evaluate runs/nano/$$stage/export --json runs/nano/$$stage/results.json || exit 1; \
	done
	$(BIN)/python -m recipes.nano.eval.publish runs/nano

clean:
	rm -rf $(VENV) $(CLIENTS) tests/clients/node_modules build/site

# What users of the package get.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing aria and what it needs into $(VENV) (PyTorch is large; the first time takes minutes) ..."
	$(PIP_INSTALL) --editable .
	@touch $@

# What tests and checks need in addition.
$(VENV)/.developed: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	$(PIP_INSTALL) --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.documented: $(VENV)/.installed
	@echo "Installing what the documentation needs ..."
	$(PIP_INSTALL) --quiet --editable '.[docs]'
	@touch $@

$(BIN)/python:
	@$(FIND_PYTHON); \
	if [ -z "$$python" ]; then \
	    echo "Aria needs Python 3.11 or newer, and none was found; install one, or name it: make demo PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$python ..."; \
	"$$python" -m venv $(VENV)
