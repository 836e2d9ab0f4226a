# `make demo` and `make test` need nothing but this checkout; they set up the rest in .venv and .tox.

# The interpreter; 3.11 or newer.
PYTHON ?= python3

VENV := .venv
# One marker for each interpreter, so that another PYTHON makes another venv.
READY := $(VENV)/.ready-$(subst /,-,$(PYTHON))
TOX := $(VENV)/bin/tox
TOOLS := $(VENV)/.tools
# pyenv's interpreters are not in the PATH; its shims there refuse to run unless they are told a version.
PYENV_ROOT ?= $(HOME)/.pyenv
pyenv_pythons = $(wildcard $(PYENV_ROOT)/versions/3.1[1-9].*/bin/python3)
pyenv_names = $(shell echo '$(pyenv_pythons)' | grep -o '/3[.]1[1-9][.]' | sed 's,/3.\(..\).,py3\1,')
discover = $(if $(pyenv_pythons),--discover $(pyenv_pythons))
# Expanded only in recipes, when the venv is there. The venv's own Python may be newer than those listed.
this_python = $(shell $(VENV)/bin/python -c 'import sys; print("py%d%d" % sys.version_info[:2])')
pythons = $(sort py311 py312 py313 $(this_python) $(pyenv_names))
comma := ,
space := $() $()

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 after any of them selects the interpreter"

.PHONY: demo
demo: $(READY) ## watch the proxy at work, from the first connection to the last byte
	@$(VENV)/bin/python demo/demo.py

# As many at once as there are cores, the longest first.
.PHONY: test
test: $(TOX) ## run every gate: lint, types, the tests on each Python there is, some fuzzing, wheel, package
	@$(TOX) run-parallel -q --parallel auto \
		-e $(subst $(space),$(comma),$(pythons)),package,systemd,guest,fuzz,types,lint,wheel $(discover)

.PHONY: unit
unit: $(READY) ## run the tests of the pure parts and of single units; less than a minute
	@$(VENV)/bin/python -m pytest -q tests/hyperstart tests/api tests/log tests/linux tests/cli tests/proxy \
		$(addprefix tests/test_,access.py conf.py settings.py tokens.py)

.PHONY: lint types coverage format
lint: $(TOX) ## check style and likely bugs
types: $(TOX) ## check the static types
coverage: $(TOX) ## run the tests and show which lines they miss
format: $(TOX) ## rewrite the code in the project's style
lint types coverage format:
	@$(TOX) run -q -e $@

.PHONY: bench
bench: $(READY) ## measure latency and throughput against a plain relay; a few minutes
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@$(VENV)/bin/python -m bench $(BENCH)

.PHONY: soak
soak: $(READY) ## run the daemon with misbehaving VMs and clients, 10 minutes; SOAK="--minutes 60"
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@$(VENV)/bin/python -m soak $(SOAK)

.PHONY: fuzz
fuzz: $(READY) requirements/fuzz.txt ## fuzz every decoder and the request loop, 10 minutes each; FUZZ="--seconds 60"
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	@$(VENV)/bin/python -m tests.fuzz $(FUZZ)

.PHONY: docs
docs: $(TOOLS) ## make the man pages and the completion of bash, zsh and fish, in build/docs
	@$(VENV)/bin/python packaging/docs.py build/docs

.PHONY: guest
guest: $(READY) ## make a kernel and an initramfs for `cc-proxyctl run --vm`, in build/guest
	@packaging/guest/build $(VENV)/bin/python

.PHONY: release deb rpm
release: $(TOOLS) ## make the archives that packages are built from: sources, docs, vendored sources
	@packaging/release $(VENV)/bin/python
deb: release ## build the Debian packages, in build/deb; needs its build dependencies
	@packaging/deb
rpm: release ## build the RPM, in build/rpm; needs rpmbuild
	@packaging/rpm/build

.PHONY: pins
pins: $(READY) ## look for newer versions of what requirements/ pins, and pin those with their hashes
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check 'pip-tools>=7.5'
	@packaging/pin $(VENV)/bin/python

.PHONY: audit
audit: $(READY) ## check the pins for known vulnerabilities; needs pypi.org or osv.dev, so it is no gate
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check 'pip-audit>=2.7'
	@packaging/audit $(VENV)/bin/python

.PHONY: clean
clean: ## remove everything that these targets made
	rm -rf .venv .tox build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 has no ensurepip until python3-venv is installed.
define install_venv_module
set -e; \
has_venv() { $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; }; \
if [ "$(PYTHON)" = python3 ] && ! has_venv && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing python3-venv"; \
	apt-get -qq update; \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends python3-venv >/dev/null; \
fi; \
if ! command -v $(PYTHON) >/dev/null; then \
	echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; \
	exit 1; \
fi; \
if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	echo "cc-proxy needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"Name another: make PYTHON=python3.12" >&2; \
	exit 1; \
fi; \
if ! has_venv; then \
	echo "$(PYTHON) cannot make a venv: install its venv package (Debian: apt-get install python3-venv)" >&2; \
	exit 1; \
fi
endef

$(READY): pyproject.toml requirements/test.txt
	@$(install_venv_module)
	@echo "setting up $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/test.txt
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(TOOLS): $(READY) requirements/package.txt
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/package.txt
	@touch $@

$(TOX): $(READY)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check 'tox>=4.21'
	@touch $@
