# Two commands from a fresh checkout: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
# many a test starts Python anew, which would compile every module again
unexport PYTHONDONTWRITEBYTECODE
say = @printf '\n==> %s\n'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
tiers := pipelines serve export docs toybox bench
.PHONY: help demo picture docs test $(tiers:%=test-%) test-studio peers test-gpu test-lower proof numeric coverage wheel bench bench-regression lint clean

help: ## this list
	@echo 'make COMMAND [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' Makefile | expand -t 20
	@echo 'Variables:'
	@echo '  PYTHON=$(PYTHON)  3.10 or newer; $(VENV) is made with it'
	@echo '  JOBS=$(JOBS)          tests at a time, about 1 GB of memory each'
	@echo '  PERFUSION_CUDA  0 leaves the CUDA kernels out, which nvcc compiles for some minutes; 1 insists on them'
	@echo '  CPUS=...        kinds of processors for the numeric tests, one process each: Prescott, Haswell, SkylakeX, Zen'
	@echo '  PIP_ARGS=...    for pip. Without an NVIDIA GPU, --extra-index-url with the address of the CPU'
	@echo '                  builds of PyTorch (pytorch.org, "Get started") saves gigabytes'

# the demo's own folder may be written anew; one that is named may hold anything
demo_args = $(if $(findstring --output,$(ARGS)),,--overwrite )$(ARGS)

demo: $(VENV)/.installed-train ## learn two concepts from a few pictures and draw them, in minutes, on any computer
	$(say) 'perfusion demo $(demo_args)'
	@$(BIN)/perfusion demo $(demo_args)

picture: demo ## the same, its overview into docs/demo.png, which README.md shows, and the sheets of docs/toybox.md
	cp perfusion-demo/overview.png docs/demo.png
	@$(BIN)/python -m perfusion.toybox.sheets docs

docs: $(VENV)/.installed-docs ## build the documentation into build/site
	@$(BIN)/python -m mkdocs build

pytest := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
at_a_time := -n $(JOBS) --dist loadfile
# files with tests of a tier, unless ARGS names some: collecting all the others would take longer than many a tier
files_of = $(if $(filter tests%,$(ARGS)),,$$(grep -rl --include='test_*.py' 'pytest\.mark\.$(1)\>' tests)) $(ARGS)
# of what ARGS names, perhaps nothing is chosen
or_none = $(if $(ARGS), || [ $$? -eq 5 ])
# the numeric ones of $(1) as on each of CPUS
as_cpus = workers="$$(.ci/as_cpus $(CPUS))" && { [ -z "$$workers" ] || \
	$(pytest) $$workers -m '$(1)' --junitxml build/numeric.xml $(call files_of,numeric)$(or_none); }

nothing :=
any_tier := $(subst $(nothing) $(nothing), or ,$(strip $(tiers)))

test: CPUS ?= Haswell Prescott
as_others := numeric and not (proof or models or $(any_tier))
# not as on this processor, too, if it can stand in for another
only_there = $(if $(shell .ci/as_cpus $(CPUS) 2> /dev/null),and not ($(as_others)))
test: $(VENV)/.installed-test ## run the tests, in minutes: public behaviour, the reference, the floor of every backend, a little of each tier below
	$(say) 'Running the tests, $(JOBS) at a time'
	@$(pytest) $(at_a_time) -m 'not proof and (smoke or not ($(any_tier))) $(only_there)' --junitxml build/tests.xml $(ARGS)$(or_none)
	$(say) 'The numeric ones, as on these kinds of processors at a time: $(CPUS)'
	@$(call as_cpus,$(as_others))

test-pipelines: ## every pipeline of diffusers that is supported, every form of a checkpoint
test-serve: ## the server: its API, its queue, what it survives
test-export: ## exported models: their pictures are the pipelines'
test-docs: ## the code of README.md and of every page
test-toybox: ## the model that is shipped, the recipe that made it, and the demo
test-bench: ## the measurements' own tests
test-bench: $(VENV)/.installed-bench
$(tiers:%=test-%): test-%: $(VENV)/.installed-test
	$(say) 'Running the tests of $*, $(JOBS) at a time'
	@$(pytest) $(at_a_time) -m '$* and not proof' --junitxml build/$*.xml $(call files_of,$*)

proof: $(VENV)/.installed-bench $(VENV)/.installed-release ## the rest: sanitizers, inserted faults, traffic, every instance on every architecture
	$(say) 'Running the proofs, $(JOBS) at a time'
	@$(pytest) $(at_a_time) -m proof --junitxml build/proof.xml $(ARGS)

numeric: CPUS ?= Prescott Haswell SkylakeX Zen
numeric: $(VENV)/.installed-test ## the numeric tests as on each kind of processor that this one can stand in for
	$(say) 'Running the numeric tests as on these kinds of processors at a time: $(CPUS)'
	@$(call as_cpus,numeric and not proof)

test-gpu: $(VENV)/.installed-test ## the tests of the kernels on an NVIDIA GPU, with the compiled library
	$(say) 'Running the tests of the kernels on the GPU'
	@PERFUSION_CUDA=1 $(BIN)/python $(install) --editable '.[test]'
	@$(BIN)/python -m pytest -q -m 'not proof' -k 'cuda-cuda or triton-cuda or gpu' tests/kernels --junitxml build/gpu.xml $(ARGS)

test-studio: $(VENV)-studio/.installed ## the tests of `perfusion studio`, in a headless Chromium where there is one
	$(say) 'Running the tests of the page'
	@OMP_NUM_THREADS=1 $(VENV)-studio/bin/python -m pytest -q -rs -n $(JOBS) --dist loadfile --junitxml build/studio.xml tests/studio $(ARGS)

coverage: $(VENV)/.installed-test ## which lines the tests of all tiers but the proofs run
	@$(pytest) $(at_a_time) -m 'not proof' --cov --cov-report term --cov-report html:build/coverage $(ARGS)
	$(say) 'Wrote build/coverage/index.html'

test-lower: $(VENV)-lower/.installed ## run the tests at the lowest versions that pyproject.toml allows
	$(say) 'Running the tests at the lower bounds'
	@OMP_NUM_THREADS=1 $(VENV)-lower/bin/python -m pytest -n $(JOBS) --dist loadfile -m 'not proof' \
		tests/perfusion tests/toybox tests/kernels $(wildcard tests/test_*.py) $(ARGS)

wheel: $(VENV)/.installed-release ## build the wheel that is given away, with kernels for every architecture, into dist
	$(say) '.ci/wheel'
	@PYTHON=$(BIN)/python .ci/wheel dist

bench: $(VENV)/.installed-bench ## measure everything that this machine can in a quarter of an hour: tables and plots in build/bench
	$(say) 'python bench/all.py'
	@OMP_NUM_THREADS=1 $(BIN)/python bench/all.py $(ARGS)

bench-regression: $(VENV)/.installed-bench ## time operators, load and swap beside a saved run: ratios to a yardstick, never times
	$(say) 'python -m bench.regression'
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.regression $(ARGS)

.PHONY: named-diffusers
named-diffusers:
	@test -d '$(DIFFUSERS)/tests' || { echo 'error: give a checkout of diffusers: make peers DIFFUSERS=folder' >&2; exit 1; }

peers: named-diffusers $(VENV)/.installed-test ## run diffusers' own tests with perfusion attached: DIFFUSERS=a checkout of diffusers
	$(say) 'diffusers'"'"' tests of the pipelines: plain, attached, and with a concept loaded'
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.peers '$(DIFFUSERS)' $(ARGS)

lint: $(VENV)/.installed-dev ## look for mistakes that need no run
	$(say) 'ruff check'
	@$(BIN)/ruff check .
	$(say) 'check-jsonschema'
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.cuda.yaml
	$(say) 'hadolint'
	@$(BIN)/hadolint docker/Dockerfile

clean: ## remove the virtual environment and everything built; concepts and pictures stay
	rm -rf $(VENV) $(VENV)-lower $(VENV)-studio build dist *.egg-info perfusion_kernels/cuda/*.so perfusion_kernels/cuda/build.json .coverage .coverage.* .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where there is nvcc, CUDA kernels are compiled against the headers of torch, which therefore comes first: for all architectures
# of CMakeLists.txt, unless TORCH_CUDA_ARCH_LIST names fewer.
install := -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

# One stamp per set of extras: what is installed already is not installed again.
$(VENV)/.installed-%: pyproject.toml constraints.txt setup.py | $(BIN)/python
	$(say) 'Installing perfusion-kernels[$*] into $(VENV)'
	@$(BIN)/python $(install) torch
	@if [ -z "$$PERFUSION_CUDA" ] && [ '$*' = test ] && [ ! -e perfusion_kernels/cuda/libperfusion_kernels_torch.so ]; then \
		export PERFUSION_CUDA=0; \
	elif [ -z "$$PERFUSION_CUDA" ] && [ ! -e perfusion_kernels/cuda/libperfusion_kernels_torch.so ] && \
		! $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
		echo 'This PyTorch is built without CUDA, so the CUDA kernels are left out. PERFUSION_CUDA=1 compiles them all the same.'; \
		export PERFUSION_CUDA=0; \
	elif command -v nvcc > /dev/null && [ "$$PERFUSION_CUDA" != 0 ]; then \
		echo 'Compiling the CUDA kernels too, which takes some minutes. PERFUSION_CUDA=0 leaves them out.'; \
	fi; \
	$(BIN)/python $(install) --editable '.[$*]'
	@sed -n 's/^{"reason": "\(.*\)"}$$/CUDA kernels are left out: \1/p' perfusion_kernels/cuda/build.json
	@touch $@

# Without the package itself, which the tests find in the tree.
$(VENV)-lower/.installed: pyproject.toml .ci/lower_bounds.py | $(BIN)/python
	$(say) 'Installing the lower bounds into $(VENV)-lower'
	@$(BIN)/python .ci/lower_bounds.py > $(VENV)/lower_bounds.txt
	@$(PYTHON) -m venv $(VENV)-lower
	@$(VENV)-lower/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --requirement $(VENV)/lower_bounds.txt
	@touch $@

# Over the environment of the other tests, as Gradio wants an older Pillow than they have.
$(VENV)-studio/.installed: .ci/constraints-studio.txt $(VENV)/.installed-test
	$(say) 'Installing Gradio and Playwright into $(VENV)-studio'
	@$(BIN)/python -m venv --clear $(VENV)-studio
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" > "$$($(VENV)-studio/bin/python -c "$$site")/tests.pth"
	@$(VENV)-studio/bin/python -m pip install --disable-pip-version-check --constraint .ci/constraints-studio.txt $(PIP_ARGS) \
		gradio pillow playwright
	@command -v chromium || command -v google-chrome || $(VENV)-studio/bin/python -m playwright install --only-shell chromium || \
		echo 'No Chromium is here and none could be fetched: what needs a browser is skipped. On Debian: sudo apt install chromium'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
		echo 'error: there is no $(PYTHON). On Debian or Ubuntu: sudo apt install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Another one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo 'error: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	$(say) 'Creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)
