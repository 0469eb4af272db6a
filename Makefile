# Two commands do everything: `make demo` and `make test`. Both make their own .venv first.

# The first of these that is Python 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
DEMO := configs/tiny.yaml
RECIPE := passkey-cpu

.PHONY: help setup demo check recheck test test-slurm bench-gpu format clean
help:
	@echo "make demo        train a small model on this machine and write its report (about ten minutes)"
	@echo "make test        everything that CI runs; without SLURM on this machine its tests are skipped"
	@echo "make test-slurm  install SLURM (as root, on Debian) and run its tests"
	@echo "make check       lint, types and unit tests, in under two minutes"
	@echo "make recheck     measure the committed weights of RECIPE=passkey-cpu again, up to a million tokens (minutes)"
	@echo "make bench-gpu   check the kernels on this machine's GPU and measure them; PYTHON is one that has torch and Triton"
	@echo "make format      let ruff format the code"
	@echo "make clean       delete .venv and caches; runs/ stays"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv with $(PYTHON): about 2 GB of libraries (with a CUDA build of torch several GB more), a few minutes"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "make: $(PYTHON) cannot make a virtual environment; install its venv package (on Debian: apt-get install python3-venv)" >&2; exit 2; }
# DeepSpeed must compile nothing: the machine may have no compiler.
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# On the CPU also where there is a GPU: two processes would need two.
demo check test test-slurm: export CUDA_VISIBLE_DEVICES :=

demo: setup
	$(BIN)/infini-train prepare --config $(DEMO) --overwrite
	$(BIN)/python launch/local.py 2 pretrain --config $(DEMO)
	$(BIN)/infini-train evaluate --config $(DEMO)
	$(BIN)/infini-train generate --config $(DEMO)
	@$(BIN)/infini-train report --config $(DEMO)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto tests/unit

# The tokenizer lies beside the weights, and nothing else of the data is needed.
recheck: setup
	@test -n "$(wildcard benchmarks/results/$(RECIPE)/seed-*.safetensors)" || { echo "make: no weights of RECIPE=$(RECIPE) are in" \
		"benchmarks/results/; there are those of $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard benchmarks/results/*/seed-*.safetensors)))))" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/infini-train evaluate passkey --config configs/$(RECIPE).yaml --run_dir runs/recheck-$(RECIPE) \
		--from_checkpoint $(wildcard benchmarks/results/$(RECIPE)/seed-*.safetensors) --data.path benchmarks/results/$(RECIPE) \
		--task.lengths '[512, 16384, 131072, 1048576]' --task.depths '[0, 0.5, 1]' --task.samples_per_cell 4 --task.rows 4

# flash-attn's Python without its CUDA kernels, for tests/kernels alone: in .venv itself a run would take it for the whole.
.venv/flash-attn/.installed: .venv/.installed
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(BIN)/pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --upgrade --target $(@D) flash-attn==2.8.3
	@touch $@

# Two files at a time, whatever the cores: a test may have eight processes, and those of a file share runs. Jobs on SLURM run alone:
# beside other tests they ran out of their time limits on two cores.
test: check .venv/flash-attn/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --durations=15 tests/distributed
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations=15 tests/slurm

test-slurm: setup
	tests/slurm/install.sh
	OMP_NUM_THREADS=1 INFINI_TRAIN_REQUIRE_SLURM=1 $(BIN)/pytest tests/slurm

# Without .venv: a GPU machine has its own torch.
bench-gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
