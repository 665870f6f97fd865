# Set-up, demo and checks of mimo-edge. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_STAMP := $(VENV)/.oracle
# llama.cpp is compiled on first install; two jobs suit small machines.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)
export GGML_NO_BACKTRACE := 1
# GCC compiles ggml's AMX code wrongly (see docs/decisions.md): stock llama.cpp would end with
# SIGSEGV on such a CPU, so what we compare with is built without it.
ifneq (,$(shell grep -sm1 -w amx_tile /proc/cpuinfo))
export CFLAGS += -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
export CXXFLAGS += -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
endif
LLAMA_CPP := $(shell sed -n 's/^ *"\(llama-cpp-python==.*\)",$$/\1/p' pyproject.toml)

SOURCES := $(shell find edge export quant runtimes devices -name '*.py' -not -path '*/__pycache__/*')

.PHONY: help setup demo test lint types unit oracle test-npu test-npu-slow test-slow test-arm \
	test-arm-quick arm-packages arm-system arm-onnx-emulator device-kit clean

help:
	@echo "make setup      create $(VENV) and install mimo-edge with its development tools"
	@echo "make demo       export the built-in mimo-nano to an int4 bundle and run two commands"
	@echo "make test       everything CI checks: lint, types, tests with the oracles"
	@echo "make test-npu   tests on Qualcomm's HTP emulator (installs onnxruntime-qnn, proprietary)"
	@echo "make test-npu-slow  one layer of MiMo-V2-Flash's width on it (half a minute)"
	@echo "make test-slow  tests that need minutes, large files or special hardware"
	@echo "make test-arm   the suite and mimo-nano on three emulated ARM processors (hours)"
	@echo "make test-arm-quick  a part of it, in minutes"
	@echo "make device-kit the archive for aarch64 Linux, into dist/"

# A new, moved or deleted source file needs the strict editable install again (seconds).
$(STAMP): pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -rf build
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python tools/amx_left_out.py || { echo "compiling llama.cpp without it"; \
		$(BIN)/python -m pip install --quiet --force-reinstall --no-deps --no-cache-dir \
			'$(LLAMA_CPP)' && \
		$(BIN)/python tools/amx_left_out.py; }
	touch $@

$(TORCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --editable '.[oracle]'
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	rm -rf demo-bundle
	$(BIN)/mimo-edge export mimo-nano demo-bundle
	$(BIN)/mimo-edge run demo-bundle -p '把客厅的灯调暗一点'
	$(BIN)/mimo-edge run demo-bundle -p 'turn on guest wifi for two hours'

test: lint types oracle

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --scripts-are-modules tests tools

unit: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not oracle'

# The whole suite, with transformers as the live oracle.
oracle: $(TORCH_STAMP)
	$(BIN)/python -m pytest -m 'not slow'

# On Qualcomm's HTP emulator: x86-64 Linux with glibc 2.35 or later.
test-npu: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[npu]'
	$(BIN)/python -m pytest -m 'qnn_sim and not slow'

test-npu-slow: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[npu]'
	$(BIN)/python -m pytest -m 'qnn_sim and slow'

test-slow: $(TORCH_STAMP)
	$(BIN)/python -m pytest -m slow

# Under emulation: docs/arm.md. ARM_PACKAGES are Debian's.
ARM_PACKAGES := qemu-user-static g++-aarch64-linux-gnu cmake make
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=5 -o Acquire::http::Timeout=60 \
	-o DPkg::Lock::Timeout=300

arm-packages:
	@for program in qemu-aarch64-static aarch64-linux-gnu-g++ cmake; do \
		command -v $$program >/dev/null || missing=1; done; \
	test -z "$$missing" || { echo "installing $(ARM_PACKAGES)"; $(APT) update && \
		$(APT) install -y --no-install-recommends $(ARM_PACKAGES) >/dev/null </dev/null; }

# What needs the package manager and the network, without the rest.
arm-system: $(STAMP) arm-packages
	PYTHONPATH=tools $(BIN)/python -m arm.root

# The emulator that ONNX Runtime needs: Debian 13's where the system's is older.
arm-onnx-emulator: arm-system
	PYTHONPATH=tools $(BIN)/python -m arm.emulator

test-arm: $(STAMP) arm-packages
	PYTHONPATH=tools $(BIN)/python -m arm.test $(ARM_OPTIONS)

test-arm-quick: $(STAMP) arm-packages
	PYTHONPATH=tools $(BIN)/python -m arm.test --quick $(ARM_OPTIONS)

device-kit: $(STAMP) arm-packages
	PYTHONPATH=tools $(BIN)/python -m arm.kit --out dist

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache demo-bundle .arm
