# Requires Python 3.11, 3.12 or 3.13 and Java 17 or 21; everything else is downloaded on first use and cached.

UV_VERSION := 0.13.9
ATHERIS_VERSION := 3.0.0
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# The distribution's Python first: those that version managers compile usually lack profile-guided optimization, and take
# a quarter more CPU time. A version manager's shim exists even for versions that are not installed, so run each candidate.
PYTHON ?= $(eval PYTHON := $(shell for p in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip; $(FITS)' >/dev/null 2>&1 && { echo $$p; break; }; done))$(PYTHON)
BIN := .venv/bin
HOME_DIR := .imagestream
# Most of a test's time is spent waiting for a JVM. Tests of a file stay together because they share services.
SIDE_BY_SIDE := -n auto --dist loadfile --no-loadscope-reorder --durations 30
IN_ORDER_OF = $(if $(filter-out random,$(ORDER)),--randomly-seed=$(ORDER))
# Some container images set this variable; every process would then recompile the modules that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Separate targets, so that make can run them side by side; the longest first.
CHECKS := check-types check-secrets check-audit check-style check-imports check-prose
CACHES := .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist

.DEFAULT_GOAL := help
.PHONY: help setup test-setup test-tools demo examples test soak mutants check $(CHECKS) docs audit bench bench-quick clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready $(HOME_DIR)/jars/.ready ## Install everything: .venv from the lock, Java if missing, the jars

test-setup: test-tools $(HOME_DIR)/tests/.backbones $(HOME_DIR)/tests/.classes

test-tools:
	@missing=""; command -v chromedriver >/dev/null || missing="chromium chromium-driver"; \
	command -v docker-compose >/dev/null || missing="$$missing docker-compose"; \
	test -z "$$missing" || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "set-up:$${missing:+ }$$missing, for the tests" && \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	} || echo "set-up: missing and not installable here: $$missing; the tests that need them will fail"
	@command -v promtool >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "set-up: promtool, for the tests" && \
		cd "$$(mktemp -d)" && apt-get update -qq && apt-get download -qq prometheus 2>/dev/null && \
		dpkg-deb -x prometheus_*.deb . && install usr/bin/promtool /usr/local/bin/; \
	} || echo "set-up: promtool is not installable here; the test that needs it will fail"

demo: setup ## Run the whole loop on real images: publish, stream, query, retrain (ARGS="--home s3://bucket/prefix")
	@set -- $(ARGS); if test "$$1" = --home; then export IMAGESTREAM_HOME="$$2"; shift 2; fi; \
		export IMAGESTREAM_JARS="$${IMAGESTREAM_JARS:-$(CURDIR)/$(HOME_DIR)/jars}"; \
		export IMAGESTREAM_BACKBONES="$${IMAGESTREAM_BACKBONES:-$(CURDIR)/$(HOME_DIR)/backbones}"; \
		$(BIN)/imagestream demo "$$@"

examples: setup ## Run five published systems on small data and print a table (ARGS="digits_transfer fruits_pca")
	@$(BIN)/python -m examples $(ARGS)

test: setup test-setup ## Run every test on real Kafka, Spark and Delta (ARGS="tests/models -x", ORDER=random)
	@$(BIN)/python -m pytest $(or $(ARGS),$(SIDE_BY_SIDE)) $(if $(ORDER),-p randomly $(IN_ORDER_OF))

soak: setup ## Run fault injection, simulations, real data and the tutorial in full, for hours (ARGS="--seed 7 -k kill")
	@$(BIN)/uv pip install -q --python $(BIN)/python atheris==$(ATHERIS_VERSION)
	@$(BIN)/python -m pytest tests/faults tests/statistics tests/models/test_real_data.py tests/test_tutorial.py \
		tests/test_demo.py tests/streaming/distributed/test_trainer.py --full $(ARGS)

mutants: setup ## Test the tests of critical modules by mutation (ARGS="--sample 20")
	@$(BIN)/python -m tests.mutants $(ARGS)

check: $(CHECKS) ## Check types, format, lint, import rules, prose and secrets; no Java, no jars

check-types: .venv/.ready
	@$(BIN)/mypy

check-secrets: .venv/.ready
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --no-verify --exclude-files '\.lock$$' --exclude-lines 'SHA256 ='

check-audit: .venv/.ready
	@$(BIN)/python .ci/audit

check-style: .venv/.ready
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

check-imports: .venv/.ready
	@$(BIN)/lint-imports

check-prose: .venv/.ready
	@$(BIN)/python .ci/prose

docs: .venv/.ready ## Build the documentation site into build/site, without network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

audit: .venv/.ready ## Look up known vulnerabilities of the locked packages; fail if a package cannot be looked up
	@$(BIN)/python .ci/audit --strict

bench: setup ## Measure speed, memory and latency, and compare them with peers (ARGS="end_to_end --json F")
	@$(BIN)/python -m benchmarks $(ARGS)

bench-quick: setup ## Run the most important benchmarks, in five minutes
	@$(BIN)/python -m benchmarks --quick $(ARGS)

clean: ## Remove caches of tests, linters and builds; keep the home
	@rm -rf $(CACHES)
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Also remove everything that set-up installed; keep tables, models and broker data in the home
	@test ! -x $(BIN)/imagestream || test ! -d $(HOME_DIR)/broker || $(BIN)/imagestream --home $(HOME_DIR) broker stop
	@rm -rf .venv $(HOME_DIR)/jars $(HOME_DIR)/java $(HOME_DIR)/backbones $(HOME_DIR)/tests
	@rmdir $(HOME_DIR) 2>/dev/null || test ! -d $(HOME_DIR) || \
		echo "kept: $$(cd $(HOME_DIR) && ls -A | tr '\n' ' ')in $(HOME_DIR); to remove your data: rm -r $(HOME_DIR)"

.venv/.locked: requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed, none was found:" \
		"install one (Debian and Ubuntu: with python3-venv), or set PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c '$(FITS)' 2>/dev/null || { echo "error: Python 3.11, 3.12 or 3.13 is needed," \
		"not $(PYTHON): set PYTHON=…" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "set-up: virtual environment in .venv, $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv .venv; }
	@echo "set-up: Python packages of requirements.lock (about 2 GB, some minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@touch $@

.venv/.ready: .venv/.locked pyproject.toml
	@echo "set-up: imagestream itself"
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation --offline -e .
	@touch $@

$(HOME_DIR)/jars/.ready: streaming/platform/ivy.xml streaming/platform/jars.lock | .venv/.ready
	@echo "set-up: Java, the jars and the default backbone (60 MB, two minutes)"
	@env IMAGESTREAM_JARS=$(HOME_DIR)/jars IMAGESTREAM_BACKBONES=$(HOME_DIR)/backbones \
		$(BIN)/imagestream --home $(HOME_DIR) setup
	@touch $@

$(HOME_DIR)/tests/.backbones: tests/prepare.py | .venv/.ready
	@echo "set-up: backbones for the tests (a minute)"
	@mkdir -p $(@D)
	@$(BIN)/python -m tests.prepare backbones
	@touch $@

$(HOME_DIR)/tests/.classes: tests/prepare.py $(HOME_DIR)/jars/.ready
	@echo "set-up: class data archives for the JVMs of the tests (a minute)"
	@mkdir -p $(@D)
	@$(BIN)/python -m tests.prepare classes
	@touch $@
