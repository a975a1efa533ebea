# make train     set up, then train on CoLA:             make train ARGS="--seed 1 --out runs/mine"
# make test      set up, then lint, types and tests:     make test ARGS="-k tree"
# make bench     set up, then the ops beside their peers: make bench ARGS="-k attention"
# make bench-loop  set up, then the whole loop beside TRL, three workloads, and what each idea brings; writes bench/RESULTS.md
# make install   only the set-up, into .venv:            make install PYTHON=/path/to/python3.12
# make compile-report   what each Triton kernel takes on A100 and H100, with both tritons: make compile-report ARGS=--summary

VENV := .venv
PYTHON ?=
ARGS ?=
STAMP := $(VENV)/.installed

# The stamp is written last and says what was installed and where, so that a failed or outdated set-up, or a folder
# that was moved since, is never taken for a good one.
WANTED := $(CURDIR) $(shell cat pyproject.toml constraints.txt | cksum)
HAVE := $(and $(wildcard $(VENV)/bin/python),$(shell cat $(STAMP) 2>/dev/null))

# The same for what the benchmarks measure fastppo against, which comes on top.
PEERS_STAMP := $(VENV)/.installed-peers
HAVE_PEERS := $(and $(wildcard $(VENV)/bin/python),$(shell cat $(PEERS_STAMP) 2>/dev/null))

# The oldest triton that the kernels are compiled with, beside the pinned one: only its compiler is used, so it lies apart.
OLDEST_TRITON := 3.6.0
OLDEST := $(VENV)/triton-$(OLDEST_TRITON)

.PHONY: install set-up peers oldest-triton train lint test compile-report bench bench-loop
.DEFAULT_GOAL := install

ifeq ($(HAVE),$(WANTED))
install:
	@:
else
install: set-up
endif

set-up:
	@rm -f $(STAMP)
	@if $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	candidates="$(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)"; \
	for candidate in $$candidates; do \
		if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "setting up $(VENV) with $$("$$candidate" --version) (once; this downloads PyTorch)"; \
			exec "$$candidate" -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "fastppo needs Python 3.11 or newer with its venv module; tried: $$candidates" >&2; \
	echo "Install it (Debian, Ubuntu: apt install python3 python3-venv), or say where it is: make PYTHON=/path/to/python3" >&2; \
	exit 1
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]' \
		|| { echo "fastppo: the installation failed (see above); the same command tries again" >&2; exit 1; }
	@echo '$(WANTED)' > $(STAMP)

ifeq ($(HAVE_PEERS),$(WANTED))
peers: install
	@:
else
peers: install
	@rm -f $(PEERS_STAMP)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,bench,peers]' \
		|| { echo "fastppo: what the benchmarks need could not be installed (see above); the same command tries again" >&2; exit 1; }
	@echo '$(WANTED)' > $(PEERS_STAMP)
endif

train: install
	@$(VENV)/bin/python -m fastppo train --task cola $(ARGS)

lint: install
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m mypy

ifeq ($(shell uname -sm),Linux x86_64)
oldest-triton: install
	@test -d $(OLDEST) || { rm -rf $(OLDEST).part; $(VENV)/bin/python -m pip install --disable-pip-version-check -q \
		--no-deps --target $(OLDEST).part triton==$(OLDEST_TRITON) && mv $(OLDEST).part $(OLDEST); } \
		|| { echo "fastppo: triton $(OLDEST_TRITON) could not be installed (see above); the same command tries again" >&2; exit 1; }
else
oldest-triton: install
	@:
endif

compile-report: oldest-triton
	@status=0; \
	$(VENV)/bin/python -m fastppo_kernels.compile_report $(ARGS) || status=1; echo; \
	PYTHONPATH=$(OLDEST) $(VENV)/bin/python -m fastppo_kernels.compile_report $(ARGS) || status=1; \
	exit $$status

# One thread per process: two workers share the cores, and threads inside each would only get in their way.
test: lint oldest-triton
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(VENV)/bin/python -m pytest -q -p no:benchmark -n 2 --dist loadfile $(ARGS)

# All cores and no other process: the figures are times.
bench: peers
	@$(VENV)/bin/python -m pytest bench --benchmark-only $(ARGS)

bench-loop: peers
	@for what in "--workload cola" "--workload few-shot" "--workload gsm8k" "--ablations --workload cola"; do \
		$(VENV)/bin/python -m bench.loop $$what $(ARGS) \
			|| { echo "fastppo: bench.loop $$what failed (see above); what was measured before is kept" >&2; exit 1; }; \
	done
	@$(VENV)/bin/python -m bench.report
