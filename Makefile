# `make run` and `make test` install everything they need, each into .venv and .tools.

PYTHON ?= python3
VENV := .venv
TOOLS := .tools
BIN := $(VENV)/bin
DIST ?= dist
PYTHONS := 3.11 3.12 3.13
NPM_PACKAGES := wscat@6.1.0 ws@8.21.0 typescript@5.9.3 @types/react@19.2.2 @types/node@22.18.0 \
	react@19.3.1 react-dom@19.3.1 esbuild@0.25.10 axe-core@4.14.1 @asyncapi/specs@6.11.1 \
	ai@7.0.173 @ai-sdk/react@4.0.177 @ag-ui/client@1.0.0 \
	publint@0.3.25
ARGS ?=

.PHONY: run test lint whole fast slow unit system clean

run: $(VENV)/run.stamp ## start the server; settings in ARGS="--port 8080"
	@$(BIN)/wsserver serve $(ARGS)

test: lint whole ## lint, types and the whole suite

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two parts of the suite run side by side, the longest ones first: they mostly wait. Make prints
# the output of each when the part has ended, and runs the others although one has failed.
PARTS := files folders browser cluster fast
TESTS_folders := -m slow $(filter-out tests/browser/ tests/cluster/ tests/__pycache__/,$(wildcard tests/*/))
TESTS_files := -m slow $(wildcard tests/test_*.py)
TESTS_browser := -m slow tests/browser
TESTS_cluster := -m slow tests/cluster
TESTS_fast := -m "not slow"

whole: $(VENV)/test.stamp system
	@rm -f .coverage .coverage.*
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target $(PARTS:%=part-%)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

part-%: $(VENV)/test.stamp
	@echo "The part $* of the tests:"
	@COVERAGE_FILE=$(CURDIR)/.coverage.$* $(BIN)/pytest --cov --cov-report= --cov-fail-under=0 $(TESTS_$*)

fast: $(VENV)/test.stamp ## the fast tests, without coverage
	$(BIN)/pytest -q -m "not slow"

slow: $(VENV)/test.stamp system ## browsers, other programs, kills, floods
	$(BIN)/pytest -q -m slow

.PHONY: pythons
pythons: $(PYTHONS:%=python-%) ## the fast tests on each supported Python of this machine

# Each Python gets its own environment. It may be on the path, or come from pyenv or uv.
python-%: pyproject.toml
	@for python in python$* "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$*.*/bin/python \
		"$${XDG_DATA_HOME:-$$HOME/.local/share}"/uv/python/cpython-$*.*/bin/python; do \
		"$$python" -c 'import ensurepip' 2>/dev/null && break || python=; \
	done; \
	if [ -z "$$python" ]; then echo "Python $*: not on this machine, skipped"; exit 0; fi; \
	venv=$(TOOLS)/python-$*; \
	"$$python" -m venv $$venv \
		&& $$venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		&& echo "Python $*: $$($$venv/bin/python --version)" \
		&& $$venv/bin/python -m pytest -q -p no:cacheprovider -m "not slow"

unit: $(VENV)/test.stamp system ## some of the tests; ARGS="-k stop"
	$(BIN)/pytest $(ARGS)

# The suite runs on Python 2.7 only, which pyenv may have.
$(TOOLS)/autobahn/stamp: | $(BIN)/python
	@for python in python2.7 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/2.7.*/bin/python; do \
		"$$python" -c 'import sys' 2>/dev/null && break || python=; \
	done; \
	own=$(TOOLS)/virtualenv-2.7; \
	test -n "$$python" && "$$python" -m pip install --quiet --target $$own virtualenv 2>/dev/null \
		&& PYTHONPATH=$$own "$$python" -m virtualenv --quiet $(TOOLS)/autobahn \
		&& $(TOOLS)/autobahn/bin/python -m pip install --quiet autobahntestsuite 2>/dev/null \
		&& touch $@ || true

.PHONY: autobahn
autobahn: $(VENV)/test.stamp $(TOOLS)/autobahn/stamp ## the Autobahn suite against the WebSocket server
	@if [ ! -e $(TOOLS)/autobahn/stamp ]; then \
		echo "Autobahn: no Python 2.7 with pip on this machine, skipped"; \
	else \
		$(BIN)/python -m tests.autobahn $(TOOLS)/autobahn/bin/wstest; \
	fi

.PHONY: soak
soak: $(VENV)/test.stamp ## all features at once for minutes; ARGS="--minutes 10"
	$(BIN)/python -m tests.bench.soak $(ARGS)

# The comparison leaves out peers whose installation fails, and says so.
$(TOOLS)/bench/stamp: tests/bench/peers/package.json tests/bench/peers/requirements.txt | $(BIN)/python
	@mkdir -p $(TOOLS)/bench && cp tests/bench/peers/package.json $(TOOLS)/bench/
	@command -v npm >/dev/null || $(MAKE) --no-print-directory apt PACKAGES="nodejs npm" || true
	@command -v redis-server >/dev/null || $(MAKE) --no-print-directory redis-server || true
	@npm install --silent --no-fund --no-audit --prefix $(TOOLS)/bench \
		&& $(BIN)/python -m venv $(TOOLS)/bench/venv \
		&& $(TOOLS)/bench/venv/bin/python -m pip install --quiet --disable-pip-version-check \
			--requirement tests/bench/peers/requirements.txt \
		&& touch $@ || true

.PHONY: bench bench-quick
bench: $(VENV)/test.stamp $(TOOLS)/bench/stamp ## compare the speed with other servers; ARGS="--only stop"
	$(BIN)/python -m tests.bench $(ARGS)

bench-quick: $(VENV)/test.stamp $(TOOLS)/bench/stamp ## the same in a minute, with Bun only
	$(BIN)/python -m tests.bench --quick $(ARGS)

.PHONY: picture
picture: $(VENV)/test.stamp system ## make the README's moving picture of the page
	$(BIN)/python -m tests.picture

# Debian needs the package python3-venv for virtual environments.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; choose one with make PYTHON=…"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(MAKE) --no-print-directory apt PACKAGES=python3-venv \
		&& $(PYTHON) -m venv $(VENV); }

# The page's libraries come from npm, see hatch_build.py. Without npm the page shows plain text.
PAGE := $(wildcard hatch_build.py wsserver/web/libraries/*.json wsserver/web/libraries/*.js)

.PHONY: npm
npm:
	@command -v npm >/dev/null || $(MAKE) --no-print-directory apt PACKAGES="nodejs npm" \
		|| echo "Without npm the page shows plain text. Install npm, and run: make clean run"

# Python compiles the modules that it imports: to compile all of them takes a third of the time.
$(VENV)/run.stamp: pyproject.toml $(PAGE) | $(BIN)/python npm
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[chat]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(PAGE) | $(BIN)/python npm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/run.stamp

# Programs that the tests use: a browser, packages of npm (wscat, and the tools for the JavaScript
# client), nginx, HAProxy, Caddy, PostgreSQL, Redis, and the tools of systemd. A test is skipped if its
# program cannot be installed; with CI=true the test fails.
system: $(TOOLS)/npm.stamp
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory apt PACKAGES=chromium || true
	@command -v openssl >/dev/null || $(MAKE) --no-print-directory apt PACKAGES=openssl || true
	@command -v nginx >/dev/null || test -x /usr/sbin/nginx || $(MAKE) --no-print-directory nginx-light || true
	@command -v haproxy >/dev/null || test -x /usr/sbin/haproxy || $(MAKE) --no-print-directory haproxy || true
	@command -v caddy >/dev/null || $(MAKE) --no-print-directory caddy || true
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || $(MAKE) --no-print-directory postgresql || true
	@command -v redis-server >/dev/null || $(MAKE) --no-print-directory redis-server || true
	@command -v systemd-analyze >/dev/null || $(MAKE) --no-print-directory apt PACKAGES=systemd || true

$(TOOLS)/npm.stamp: Makefile
	@command -v npm >/dev/null || $(MAKE) --no-print-directory apt PACKAGES="nodejs npm" || true
	@command -v npm >/dev/null && npm install --silent --no-fund --no-audit --prefix $(TOOLS) $(NPM_PACKAGES) && touch $@ || true

# The packages start a service, now and at each boot. The tests need only the programs.
.PHONY: nginx-light haproxy caddy redis-server postgresql
nginx-light haproxy caddy redis-server postgresql:
	@$(MAKE) --no-print-directory apt PACKAGES=$@
	@if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO="sudo -n"; fi; \
		! command -v systemctl >/dev/null \
		|| $$SUDO systemctl disable --now --quiet $(@:-light=) 2>/dev/null || true

# The packages to publish: see CONTRIBUTING.md.
.PHONY: wheel
wheel: $(VENV)/test.stamp ## make the wheel and the source distribution, in dist/
	$(BIN)/python -m build --no-isolation --outdir $(DIST)

# TypeScript makes the types from the comments.
NPM_FILES := $(addprefix wsserver/web/,client.js ai-sdk.js react.js blocks.d.ts frames.d.ts package.json README.md) LICENSE

.PHONY: npm-package
npm-package: $(TOOLS)/npm.stamp ## make the npm package of the JavaScript client, in dist/
	@rm -rf $(DIST)/npm && mkdir -p $(DIST)/npm
	@cp $(NPM_FILES) $(DIST)/npm && ln -s $(abspath $(TOOLS)/node_modules) $(DIST)/npm/
	cd $(DIST)/npm && node_modules/.bin/tsc --allowJs --declaration --emitDeclarationOnly --skipLibCheck \
		--strict --target es2022 --module nodenext --types react --lib es2024,dom,dom.iterable client.js ai-sdk.js react.js
	@cd $(DIST)/npm && sed -i.old -E '/@internal.*\*\/$$/d; /@internal.* _[a-z]/d; /^ +(get )?_[a-z].*;$$/d' client.d.ts && rm client.d.ts.old
	cd $(DIST)/npm && npm pack --silent --pack-destination ..

.PHONY: apt
apt:
	@command -v apt-get >/dev/null || { echo "please install: $(PACKAGES)"; exit 1; }
	@if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO="sudo -n"; fi; \
		export DEBIAN_FRONTEND=noninteractive; \
		$$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y --no-install-recommends $(PACKAGES) >/dev/null \
		|| { echo "please install: $(PACKAGES)"; exit 1; }

clean:
	rm -rf $(VENV) $(TOOLS) dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
