# `make up` and `make test` are all one needs: each makes .venv and installs the hash-locked requirements first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# As the image's build does: where PYTHONDONTWRITEBYTECODE is set, every start compiles all of it: a third of the imports' CPU time.
COMPILE := @$(VENV)/bin/python -m compileall -q app loadtest

.PHONY: up down test gate budget drills soak cache-eval frameworks lint audit bench lock

up: $(STAMP)  ## start the whole stack on this machine; ARGS are `gateway up`'s
	$(COMPILE)
	$(VENV)/bin/gateway up $(ARGS)

down: $(STAMP)  ## stop a stack started with ARGS=--detach
	$(VENV)/bin/gateway down $(ARGS)

test: $(STAMP) lint  ## the test suite, on real Redis, PostgreSQL and Traefik; a file stays with one of two workers
	$(COMPILE)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

gate: $(STAMP)  ## the pre-ship gates on a stack of their own: load, fallback drill, evals; build/preship.html
	$(COMPILE)
	$(VENV)/bin/gateway preship --apps loadtest/gate --report build/preship.html $(ARGS)

budget: $(STAMP)  ## machine instructions of a call, and how many times nginx's, held to loadtest/budget/kept.json. ARGS=--keep
	$(COMPILE)
	$(VENV)/bin/python -m loadtest.budget $(ARGS)

drills: $(STAMP)  ## the long ones: chaos under load, and what the suite does in small, ten times as often; build/drills.xml
	$(COMPILE)
	$(VENV)/bin/python -m pytest -m drill --durations=0 --durations-min=1 --junit-xml=build/drills.xml $(ARGS)
	$(if $(ARGS),,ISOLATION_CASES=100000 $(VENV)/bin/python -m pytest tests/test_isolation.py)

cache-eval: $(STAMP)  ## labelled questions through the semantic cache: hits and wrong answers for each mode; ARGS="questions.csv"
	$(VENV)/bin/python -m loadtest.cache_eval $(ARGS)

soak: $(STAMP)  ## a million calls with hang-ups and vendor errors: nothing grows; build/soak.html. ARGS="--calls 20000"
	$(COMPILE)
	$(VENV)/bin/python -m loadtest.soak $(ARGS)

frameworks: $(STAMP)  ## agent frameworks through Traefik, and schemathesis on /schema, from .venv-frameworks; minutes
	test -x .venv-frameworks/bin/python || $(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-frameworks.lock
	$(VENV)/bin/python -m pytest -m drill tests/test_frameworks.py $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

audit: $(STAMP)  ## secrets in the repository, known vulnerabilities, build/sbom.json; says where it cannot look things up
	$(VENV)/bin/python .ci/audit.py

bench: $(STAMP)  ## requests/s per core, added latency, memory; by hand. VENV=.venv-optimised PYTHON=/usr/bin/python3: with another Python
	$(COMPILE)
	$(VENV)/bin/python -m loadtest.bench $(ARGS)

$(STAMP): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lock:  ## after changing dependencies; the lock files name no host
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements.lock
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml --group dev -o requirements-dev.lock
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 --group frameworks -o requirements-frameworks.lock
