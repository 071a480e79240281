# SPDX-License-Identifier: Apache-2.0
#
# What people do here; `make help` lists it. Everything is written below this directory: .venv/ and build/.

PYTHON ?= python3
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
VENV := .venv
BIN := $(VENV)/bin
# cmake and ninja come from the environment where the system has none that is recent enough
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHON CC
# Tests start some thousand processes: without byte code each of them would compile the whole package.
unexport PYTHONDONTWRITEBYTECODE

# STEP SECONDS NAME COMMAND: what it may take before all of it is killed.
STEP := $(BIN)/python tools/run_step.py --timeout
LOGS := build/logs
ONCE_MORE := $(BIN)/python tools/once_more.py --log $(LOGS)/unstable.log --
FUZZ_SECONDS ?= 60
FUZZ_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests: more than there are processors, since most of what the tests do is to wait.
PYTEST_JOBS ?= 3

# What the installed package is built from. Python modules are not in this list: the install is an editable one.
BUILT_FROM := pyproject.toml CMakeLists.txt tools/setup.sh docker/seccomp-userfaultfd.json $(wildcard examples/systemd/* examples/prometheus/*) \
	$(shell find csrc -path csrc/tests -prune -o -type f \( -name '*.[chS]' -o -name '*.txt' -o -name '*.ld' -o -name '*.inc' -o -name '*.sh' -o -name cdef.py \) -print)

# Where the C core is built for tests: one directory for each compiler and kind.
B := build/$(notdir $(CC))

.DEFAULT_GOAL := help
.PHONY: help setup demo check check-1 check-2 test test-1 test-2 lint cross-aarch64 format stub check-c sanitize stress fuzz fuzz-replay guests-rv64 test-containers check-python hostile check-hostile bench soak docs man completion sdist wheel check-packages clean

help: ## list these targets
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)/  \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-17s%s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12 and CC=clang say what to build with; PYTEST_ARGS='-k pager' goes to pytest."

setup: $(VENV)/.installed ## build postcopy and install it into .venv, with what its tests need
	@echo "setup: postcopy is installed in $(VENV): $(BIN)/postcopy"

# An extra of pyproject.toml that only some targets need: dist, fuzz.
$(VENV)/.extra-%: pyproject.toml tools/setup.sh | setup
	@tools/setup.sh extra $(VENV) $*
	@touch $@

$(VENV)/.installed: $(BUILT_FROM)
	@tools/setup.sh install $(VENV)
	@touch $@

demo: setup ## migrate a running machine between two processes here, and verify it
	$(BIN)/postcopy demo

# What one runs before every commit. Two things at a time: most of what either side does is to wait.
check: setup ## lint, types, unit tests and C tests that take no time: before every commit
	@$(MAKE) --no-print-directory $(B)-plain
	@$(MAKE) --no-print-directory -j2 check-1 check-2

check-1:
	@$(STEP) 120 --log $(LOGS)/lint.log "lint" $(MAKE) --no-print-directory lint
	@$(STEP) 120 --log $(LOGS)/c.log "C tests" ctest --test-dir $(B)-plain --output-on-failure -L unit -LE slow -j2
check-2:
	@$(STEP) 120 --log $(LOGS)/unit.log "unit tests" $(BIN)/pytest -q -n 4 --dist worksteal tests/unit -m "not slow" $(PYTEST_ARGS)

# Each step has a log of its own, of which a step that fails shows the end.
test: setup ## everything CI runs: lint, C tests, sanitizers, fuzzing, pytest, hostile peers, containers, docs, packages
	@$(STEP) 400 --log $(LOGS)/build.log "C builds" $(MAKE) --no-print-directory $(C_BUILDS) cross-aarch64
	@$(STEP) 400 --log $(LOGS)/install.log "Debian packages that tests need" $(BIN)/python tools/debian.py install zsh fish man qemu-system-x86_64 chromium
	@rm -f $(LOGS)/unstable.log
	@status=0; $(MAKE) --no-print-directory -j2 test-1 test-2 || status=$$?; cat $(LOGS)/unstable.log 2>/dev/null; exit $$status

# All steps of a lane, whatever fails: one run shows all that is wrong. pytest alone takes as long as all the others. (Slow C tests
# run under sanitizers only.)
test-1:
	@failed=; \
	$(STEP) 300 --log $(LOGS)/lint.log "lint" $(MAKE) --no-print-directory lint || failed=1; \
	$(STEP) 200 --log $(LOGS)/docs.log "documentation" $(MAKE) --no-print-directory docs || failed=1; \
	$(STEP) 300 --log $(LOGS)/c.log "C tests" $(ONCE_MORE) ctest --test-dir $(B)-plain --output-on-failure -L unit -LE slow -j2 || failed=1; \
	$(STEP) 600 --log $(LOGS)/sanitize.log "C tests, sanitized" $(MAKE) --no-print-directory sanitize || failed=1; \
	$(STEP) 180 --log $(LOGS)/fuzz.log "fuzz targets: corpus and a short run" $(MAKE) --no-print-directory fuzz-replay || failed=1; \
	$(STEP) 400 --log $(LOGS)/hostile.log "hostile peers" $(MAKE) --no-print-directory check-hostile PYTEST_ARGS= || failed=1; \
	$(STEP) 800 --log $(LOGS)/packages.log "packages" $(MAKE) --no-print-directory check-packages PYTEST_ARGS= || failed=1; \
	$(STEP) 500 --log $(LOGS)/containers.log "containers" $(MAKE) --no-print-directory test-containers OR_SKIP=--or-skip PYTEST_ARGS= \
		POSTCOPY_WHEEL="$$(ls dist/*.whl 2>/dev/null)" || failed=1; \
	[ -z "$$failed" ]
test-2:
	@$(STEP) 1300 --log $(LOGS)/pytest.log "pytest" $(MAKE) --no-print-directory check-python

lint: setup $(B)-plain ## ruff, mypy --strict, the rooms' imports, the C core with all warnings as errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python csrc/cdef.py stub --header csrc/include/postcopy.h --check postcopy/_native.pyi

cross-aarch64: setup ## compile the C core for AArch64 (Debian's gcc-aarch64-linux-gnu; POSTCOPY_INSTALL=1: installs it)
	@tools/cross_aarch64.sh build/cross-aarch64

format: setup ## let ruff sort imports and format the Python files
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

stub: setup ## write postcopy/_native.pyi again after a change of a public header
	$(BIN)/python csrc/cdef.py stub --header csrc/include/postcopy.h --output postcopy/_native.pyi

# The core with its tests (and fuzz targets, where they run); ninja knows what is out of date.
CMAKE_plain :=
CMAKE_asan := -DPOSTCOPY_FUZZ=ON -DPOSTCOPY_SANITIZE=address,undefined
CMAKE_tsan := -DPOSTCOPY_SANITIZE=thread
C_BUILDS := $(B)-plain $(B)-asan $(B)-tsan
.PHONY: $(C_BUILDS)
$(C_BUILDS): $(B)-%: setup
	@[ -f $@/build.ninja ] || cmake -S . -B $@ -G Ninja -DCMAKE_C_COMPILER=$(CC) -DPOSTCOPY_WERROR=ON \
		-DPOSTCOPY_BUILD_TESTS=ON $(CMAKE_$*) >$@.log || { cat $@.log; exit 1; }
	ninja -C $@ --quiet

check-c: $(B)-plain ## C unit tests
	ctest --test-dir $< --output-on-failure -L unit -j2

sanitize: $(B)-asan $(B)-tsan ## C unit tests under ASan + UBSan and under TSan
	@failed=; for build in $^; do $(ONCE_MORE) ctest --test-dir $$build --output-on-failure -L unit -j3 || failed=1; done; [ -z "$$failed" ]

stress: $(B)-plain ## race faults, handlers and discards on one userfaultfd, SECONDS (60) for each kind of memory
	POSTCOPY_STRESS_SECONDS=$(or $(SECONDS),60) $</csrc/tests/test_uffd_stress

fuzz-replay: $(B)-asan
	ctest --test-dir $< --output-on-failure -L fuzz

fuzz: $(B)-asan $(VENV)/.extra-fuzz ## run all fuzz targets, FUZZ_SECONDS (60) each; with CC=clang those in C under libFuzzer
	$(BIN)/python tools/fuzz.py --build $< --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

guests-rv64: ## build the guest programs of the rv64 machine again (needs Debian's gcc-riscv64-linux-gnu)
	sh csrc/machine/guest/build_rv64.sh csrc/machine/guest/rv64

# OR_SKIP=--or-skip: a machine that has no Docker says so and goes on (unless POSTCOPY_INSTALL=1 lets it be installed).
# POSTCOPY_WHEEL=FILE: what to install in the image; else a wheel is built.
test-containers: setup ## migrate between containers; as root it starts its own Docker daemon (POSTCOPY_INSTALL=1: installs it)
	POSTCOPY_WHEEL="$(POSTCOPY_WHEEL)" $(BIN)/python tools/containers.py test $(OR_SKIP) -- \
		$(ONCE_MORE) $(BIN)/pytest -n 2 --dist worksteal tests/containers $(PYTEST_ARGS)

check-python: setup ## pytest, PYTEST_JOBS (3) at a time, without the containers and the hostile peers
	$(ONCE_MORE) $(BIN)/pytest -v -n $(PYTEST_JOBS) --dist worksteal --ignore=tests/hostile --ignore=tests/packages --ignore=tests/containers --durations=25 $(PYTEST_ARGS)

# POSTCOPY_COMMAND: attack another installation than the one here. POSTCOPY_SEED=N: repeat a fuzz test.
hostile: setup ## attack the installed program from outside, all of it; SECONDS (60) for each fuzz test
	POSTCOPY_FUZZ_SECONDS=$(or $(SECONDS),60) $(BIN)/pytest tests/hostile $(PYTEST_ARGS)

check-hostile: setup
	$(ONCE_MORE) $(BIN)/pytest -n $(PYTEST_JOBS) --dist worksteal tests/hostile -m "not slow" $(PYTEST_ARGS)

docs: setup ## build the documentation as a site into build/site; a warning is an error
	$(BIN)/sphinx-build -q -E -a -W --keep-going -b html -c docs/site -d build/site.cache . build/site
	@echo "docs: build/site/index.html"

# Each run is kept in build/bench. FIGURES="fault bulk": these, without a limit of time. (The status is that of the measurement: a goal that is not reached.)
bench: setup ## measure against floors, in ten minutes at most, and say what has changed since the last run
	@mkdir -p build/bench; last=$$(ls build/bench/*.jsonl 2>/dev/null | tail -n 1); now=build/bench/$$(date -u +%Y%m%dT%H%M%SZ).jsonl; status=0; \
	$(BIN)/postcopy bench $(or $(FIGURES),quick --within 9min) --output "$$now" || status=$$?; \
	if [ -z "$$last" ] || ! [ -e "$$now" ]; then echo "bench: nothing to compare with yet"; exit $$status; fi; \
	echo; echo "bench: since the last run:"; $(BIN)/postcopy bench compare "$$last" "$$now" || true; exit $$status

soak: setup ## migrate over a network that is cut several times a second, for SECONDS (600); every page is verified
	$(BIN)/python -m postcopy.testbed.soak --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

# Man pages and completions, made of the parsers, for packages: where CMake installs them from.
SHARE := build/share
man: setup ## write the man pages into build/share
	@mkdir -p $(SHARE)/man/man1
	$(BIN)/postcopy man $(SHARE)/man/man1

completion: setup ## write the completions of bash, zsh and fish into build/share
	@mkdir -p $(addprefix $(SHARE)/,bash-completion/completions zsh/site-functions fish/vendor_completions.d)
	$(BIN)/postcopy completion bash >$(SHARE)/bash-completion/completions/postcopy
	$(BIN)/postcopy completion zsh >$(SHARE)/zsh/site-functions/_postcopy
	$(BIN)/postcopy completion fish >$(SHARE)/fish/vendor_completions.d/postcopy.fish

sdist: $(VENV)/.extra-dist man completion ## write the source distribution into dist/, and check it
	@rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist . >build/sdist.log 2>&1 || { cat build/sdist.log; exit 1; }
	$(BIN)/twine --no-color check --strict dist/*.tar.gz

# From the source distribution, so that it is known to be whole. The platform's tag says which C library it needs.
wheel: sdist ## build the abi3 wheel from it into dist/, tag it for manylinux, and check it
	@rm -rf build/wheel dist/*.whl
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel dist/*.tar.gz
	$(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/twine --no-color check --strict dist/*.whl

# In minimal Debian 12 and 13, which are made here as root (POSTCOPY_INSTALL=1: installs debootstrap).
check-packages: wheel ## look into the packages, and install them in fresh Debian 12 and 13 as root and as a user
	$(ONCE_MORE) $(BIN)/pytest -n 2 --dist loadscope tests/packages $(PYTEST_ARGS)

clean: ## remove everything that was built, .venv too
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find postcopy tests tools csrc -name __pycache__ -type d -prune -exec rm -rf {} +
