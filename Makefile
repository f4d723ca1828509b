# Each command is complete on a fresh machine with Python 3.11 or newer: it makes its
# own environment in .venv/, one per Python version, from the pins in requirements/.
#
#   make test                          all tests             ARGS="-k lift -n 0" some
#   make interop                       against PyTorch's loralib and peft
#   make faults                        kill training 50 times; 25,000 damaged files
#   make demo                          fine-tune MiniLM      ARGS=--help lists the options
#   make llm                           fine-tune SmolLM2 on a 4-bit base, in < 20 minutes
#   make sweep                         sixteen runs of a sweep as one
#   make domains, make serve           four adapters trained in one batch; many served
#   make many                          both
#   make docs                          build the documentation, with every cell run
#   make lint                          ruff and mypy
#   make test PYTHON=python3.13        with another Python

PYTHON ?= python3
ARGS ?=
UV := uv==0.13.9

VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error "$(PYTHON)" does not run; name a Python 3.11 or newer with make PYTHON=...)
endif
ifneq ($(filter 2.% 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(VERSION)),)
$(error jlora needs Python 3.11 or newer, "$(PYTHON)" is $(VERSION); name another with make PYTHON=...)
endif

# Python 3.11 tests the lower bounds of pyproject.toml, every other one the newest.
LOCK := requirements/$(if $(filter 3.11,$(VERSION)),oldest,newest).txt
VENV := .venv/$(VERSION)
PY := $(VENV)/bin/python
READY := $(VENV)/ready
DOCS := .venv/docs-$(VERSION)

# Seconds; and the system's certificates, as pip does, so that proxies work.
export UV_HTTP_TIMEOUT ?= 60
export UV_SYSTEM_CERTS ?= true
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: test interop faults demo llm sweep domains serve many docs lint format lock env clean

test: $(READY)
	@$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# Against PyTorch: 200 MB to 3 GB more, by the index that pip finds it on.  The pins of
# the environment hold.
interop: $(READY)
	@sed -n 's/^\([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' $(LOCK) > $(VENV)/pins.txt
	@$(PY) -m pip install --quiet --timeout 60 --constraint $(VENV)/pins.txt \
		torch==2.13.0 loralib==0.1.2 peft==0.21.2
	@$(PY) -m pytest tests/test_loralib.py tests/test_peft.py tests/test_peft_files.py \
		examples/smollm/test_smollm.py $(ARGS)

# Many more kills of training runs, and hostile files, than `make test` has.
faults: $(READY)
	@JLORA_MUTANTS=25000 $(PY) -m pytest tests/test_peft_hostile.py -n logical $(ARGS)
	@JLORA_KILLS=50 $(PY) -m pytest tests/test_pod.py -n 0 $(ARGS)

demo: $(READY)
	@$(PY) examples/minilm/main.py $(ARGS)

llm: $(READY)
	@$(PY) examples/smollm/main.py $(ARGS)

sweep: $(READY)
	@$(PY) examples/many/sweep.py $(ARGS)

domains: $(READY)
	@$(PY) examples/many/domains.py $(ARGS)

serve: $(READY)
	@$(PY) examples/many/serve.py $(ARGS)

# For options that both have, such as --quick.
many: $(READY)
	@$(PY) examples/many/domains.py $(ARGS)
	@$(PY) examples/many/serve.py $(ARGS)

# -E: every page anew, since its cells run code that may have changed.
docs: $(DOCS)/ready
	@echo "[3/3] docs/_build/html: the pages, whose cells are run (a minute or two)"
	@$(DOCS)/bin/python -m sphinx -q -E -W --keep-going -j 4 docs docs/_build/html $(ARGS)
	@echo "open docs/_build/html/index.html"

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(READY)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

env: $(READY)

$(VENV)/bin/uv $(DOCS)/bin/uv: %/bin/uv:
	@echo "[1/3] $*: a new environment"
	@"$(PYTHON)" -m venv --clear $*
	@$*/bin/python -m pip install --quiet --timeout 60 --retries 5 $(UV)

$(READY): pyproject.toml $(LOCK) | $(VENV)/bin/uv
	@echo "[2/3] $(VENV): the packages of $(LOCK) (230 MB on the first run)"
	@$(PY) -m uv pip sync --quiet --python $(PY) $(LOCK)
	@echo "[3/3] $(VENV): jlora itself"
	@$(PY) -m uv pip install --quiet --python $(PY) --no-build-isolation --no-deps --editable .
	@$(PY) -m uv pip check --quiet --python $(PY)
	@touch $@

$(DOCS)/ready: requirements/docs.txt | $(DOCS)/bin/uv
	@echo "[2/3] $(DOCS): the packages of $< (250 MB on the first run)"
	@$(DOCS)/bin/python -m uv pip sync --quiet --python $(DOCS)/bin/python $<
	@touch $@

# Rewrites the pins; "make lock ARGS=--upgrade" also moves them to newer releases.
COMPILE = $(PY) -m uv pip compile pyproject.toml --quiet --no-header --no-annotate $(ARGS)
TESTED := --extra test --extra examples
lock: $(VENV)/bin/uv
	$(COMPILE) $(TESTED) --python-version 3.11 --resolution lowest-direct -o requirements/oldest.txt
	$(COMPILE) $(TESTED) --python-version 3.12 --universal -o requirements/newest.txt
	$(COMPILE) --extra docs --python-version 3.11 --universal -o requirements/docs.txt

clean:
	rm -rf .venv docs/_build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
