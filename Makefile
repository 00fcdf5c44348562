# make train: environment, installation, a real training run on two context-parallel ranks (all GPUs where there are some)
# make test:  everything that needs no GPU
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,hopper,dev]'
	touch $@

train: .venv/.installed
	ranks=$$($(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)"); \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc-per-node $$ranks launch/train.py cp.size=$$ranks

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:
	rm -rf .venv runs build *.egg-info
