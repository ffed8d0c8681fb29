# samba.cu: everything a person does. `make help` lists it.
#
#   CPU=1            build for the CPU even where nvcc is found
#   PRECISION=FP32   GPU build in float instead of bf16 (no TF32), for parity with the reference
#   DEBUG=1          symbols, no optimisation, address and undefined-behaviour checks on the CPU
#   MARCH=x86-64-v3  CPU to build for; default: this one (native)
#   ARCH=90a         GPU architecture to build for; default: the GPU's own, and 80 and 90a where there is none

SHELL := /bin/bash
.DEFAULT_GOAL := all
MAKEFLAGS += --no-builtin-rules

# ---------------------------------------------------------------------------------------------------------------------
# What this machine has

NVCC := $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
GPU_NAME := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
HASH := \#
has_header = $(shell echo '$(HASH)include <$(1)>' | $(CXX) -std=c++20 $(2) $(CPPFLAGS) -x c++ -fsyntax-only - 2>/dev/null && echo yes)
HAVE_SENTENCEPIECE := $(call has_header,sentencepiece_processor.h)
HAVE_OPENBLAS := $(call has_header,cblas.h)
MPI_WORDS := $(shell (mpicxx --showme || mpicxx -show) 2>/dev/null)
MPI_INCLUDE := $(filter -I%,$(MPI_WORDS))
HAVE_MPI := $(call has_header,mpi.h,$(MPI_INCLUDE))
HAVE_NCCL := $(if $(NVCC),$(call has_header,nccl.h,-I$(dir $(realpath $(NVCC)))../include))

ifeq ($(NVCC),)
CPU := 1
endif
MARCH ?= native
PRECISION ?= BF16
PRECISION := $(shell echo $(PRECISION) | tr a-z A-Z)
ifeq ($(filter $(PRECISION),BF16 FP32),)
$(error PRECISION=$(PRECISION): choose BF16 or FP32)
endif

ifeq ($(CPU),1)
VARIANT := cpu
else
VARIANT := gpu-$(shell echo $(PRECISION) | tr A-Z a-z)
endif
ifeq ($(DEBUG),1)
VARIANT := $(VARIANT)-debug
endif
BUILD := build/$(VARIANT)
COMMIT := $(shell git describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)

# ---------------------------------------------------------------------------------------------------------------------
# How to compile

DEFINES := -DSAMBA_SOURCE_DIR='"$(CURDIR)"'
LIBRARIES := -lpthread
ifeq ($(HAVE_SENTENCEPIECE),yes)
LIBRARIES += -lsentencepiece
else
DEFINES += -DSAMBA_NO_SENTENCEPIECE
endif

ifeq ($(HAVE_MPI),yes)
DEFINES += -DSAMBA_MPI $(MPI_INCLUDE)
LIBRARIES += $(filter -L% -lmpi,$(MPI_WORDS))
endif

WARNINGS := -Wall -Wextra -Wno-unknown-pragmas -Wno-restrict
ifeq ($(CPU),1)
DEFINES += -DSAMBA_CPU
ifeq ($(HAVE_OPENBLAS),yes)
DEFINES += -DSAMBA_OPENBLAS
LIBRARIES += -lopenblas
endif
comma := ,
OPTIMISE := $(if $(filter 1,$(DEBUG)),-O1 -g -fsanitize=address$(comma)undefined,-O3 -march=$(MARCH))
COMPILE = $(CXX) -std=c++20 $(OPTIMISE) -fopenmp $(WARNINGS) $(DEFINES) $(CPPFLAGS) -MMD -MP -x c++
LINK = $(CXX) $(OPTIMISE) -fopenmp $(LDFLAGS)
else
ARCH ?= $(if $(GPU_ARCH),$(if $(filter 90,$(GPU_ARCH)),90a,$(GPU_ARCH)),80 90a)
GENCODE := $(foreach a,$(ARCH),-gencode arch=compute_$(a),code=sm_$(a))
ifeq ($(PRECISION),FP32)
DEFINES += -DSAMBA_FP32
endif
ifeq ($(HAVE_NCCL),yes)
DEFINES += -DSAMBA_NCCL
LIBRARIES += -lnccl
endif
OPTIMISE := $(if $(filter 1,$(DEBUG)),-O0 -g -lineinfo,-O3 -lineinfo)
LANGUAGE = -std=c++20 -Xcompiler -fopenmp,-march=$(MARCH),-Wall,-Wno-unknown-pragmas --expt-relaxed-constexpr -diag-suppress 20012 \
           $(DEFINES) $(CPPFLAGS) -MMD -MP -x cu
COMPILE = $(NVCC) $(OPTIMISE) $(GENCODE) $(LANGUAGE)
CHECK = $(NVCC) -ptx -arch=sm_$(firstword $(ARCH)) -Xcicc -O0 $(LANGUAGE)
LINK = $(NVCC) $(GENCODE) -Xcompiler -fopenmp $(LDFLAGS)
LIBRARIES += -lcublasLt
endif

# Programs for readers, in the order in which to read and run them
LADDER := $(patsubst dev/%.cu,$(BUILD)/%,$(sort $(wildcard dev/ladder/*/[0-9]*.cu)))

TEST_SOURCES := test_samba.cu $(wildcard dev/test/test_*.cu)
TEST_OBJECTS := $(patsubst %.cu,$(BUILD)/obj/%.o,$(notdir $(TEST_SOURCES)))
vpath %.cu . dev/test dev/bench

# ---------------------------------------------------------------------------------------------------------------------
##@ Build

.PHONY: all
all: report $(BUILD)/train_samba ## Build train_samba for this machine (CPU=1, PRECISION=FP32, DEBUG=1)
	@ln -sf $(BUILD)/train_samba train_samba
	@echo "built $(BUILD)/train_samba (also ./train_samba)"

.PHONY: tests-build
tests-build: $(BUILD)/test_samba ## Build the tests

$(BUILD)/obj/%.o: %.cu $(BUILD)/flags | $(BUILD)/obj
	@echo "  compile $<"
	@$(COMPILE) -c $< -o $@

$(BUILD)/train_samba: $(BUILD)/obj/train_samba.o
	@echo "  link $@"
	@$(LINK) $^ -o $@ $(LIBRARIES)

$(BUILD)/test_samba: $(TEST_OBJECTS)
	@echo "  link $@"
	@$(LINK) $^ -o $@ -lgtest $(if $(HAVE_SENTENCEPIECE),-lsentencepiece_train) $(LIBRARIES)

$(BUILD)/bench_%: $(BUILD)/obj/bench_%.o
	@echo "  link $@"
	@$(LINK) $^ -o $@ $(LIBRARIES)

$(BUILD)/ladder/%.o: dev/ladder/%.cu $(BUILD)/flags
	@echo "  compile $<"
	@mkdir -p $(@D)
	@$(COMPILE) -c $< -o $@

$(LADDER): %: %.o
	@$(LINK) $^ -o $@

.PHONY: $(BUILD)/ladder-programs
$(BUILD)/ladder-programs: $(LADDER)
.SECONDARY: $(LADDER:=.o)

# That a program compiles which no test runs: no optimisation, no machine code, seconds instead of minutes
CHECKED_BENCHMARKS := $(patsubst dev/bench/%.cu,$(BUILD)/checked/%.ptx,$(wildcard dev/bench/*.cu))
$(BUILD)/checked/%.ptx: %.cu $(BUILD)/flags
	@echo "  check $<"
	@mkdir -p $(@D)
	@$(CHECK) $< -o $@

.PHONY: $(BUILD)/benchmarks-checked
$(BUILD)/benchmarks-checked: $(CHECKED_BENCHMARKS)

$(BUILD)/obj/train_samba.o $(BUILD)/checked/train_samba.ptx: DEFINES += -DSAMBA_COMMIT='"$(COMMIT)"'

$(BUILD)/obj:
	@mkdir -p $@

# Other flags than last time: compile again
FLAGS := $(COMPILE) $(LINK) $(LIBRARIES)
$(BUILD)/flags: FORCE | $(BUILD)/obj
	@echo '$(subst ','\'',$(FLAGS))' | cmp -s - $@ || echo '$(subst ','\'',$(FLAGS))' > $@
.PHONY: FORCE
FORCE:

-include $(wildcard $(BUILD)/obj/*.d $(BUILD)/checked/*.d $(BUILD)/ladder/*/*.d)

.PHONY: report
report: ## What this machine has, and what to do about what it lacks
	@NVCC="$(NVCC)" GPU="$(GPU_NAME)" ARCH="$(GPU_ARCH)" CXX="$(CXX)" CPPFLAGS="$(CPPFLAGS)" LDFLAGS="$(LDFLAGS)" bash scripts/report.sh
	@echo "  building $(VARIANT)$(if $(GENCODE), for $(addprefix sm_,$(ARCH)))"

.PHONY: setup
setup: ## Install what is missing: apt packages and .venv
	@bash scripts/setup.sh

.PHONY: clean
clean: ## Remove everything that was built
	rm -rf build train_samba

# ---------------------------------------------------------------------------------------------------------------------
##@ Train

PYTHON := .venv/bin/python
OUT ?= out/quickstart
QUICK ?=

# make data DATASET=tinystories ARGS='--tokenizer gpt2' prepares another; python -m data.prepare --help has all
DATASET ?= stdlib
DATA := data/$(notdir $(DATASET))
ARGS ?= --vocab-size 4096

.PHONY: data
data: setup ## Prepare a corpus (DATASET=NAME ARGS='...'): by default the Python standard library's text
	@$(PYTHON) -m data.prepare --dataset $(DATASET) $(ARGS) --out $(DATA)

# A sub-make builds, because what the machine has is looked up when make starts, before setup has installed it. A machine
# with a CUDA compiler and no GPU trains on its CPU.
.PHONY: train
train: data ## From nothing to a sampled sentence: install, build, prepare, train, sample, plot (five to ten minutes)
	@$(MAKE) --no-print-directory all $(if $(GPU_ARCH),,CPU=1)
	@./scripts/quickstart.sh ./train_samba $(DATA) $(OUT) $(QUICK)

# ---------------------------------------------------------------------------------------------------------------------
##@ Test

.PHONY: test
test: setup ## Every test that this machine can run; says what it skipped and why
	@$(PYTHON) scripts/run_tests.py

.PHONY: sanitize
sanitize: ## Kernel tests under compute-sanitizer: memcheck, then racecheck (needs a GPU; slow)
	@$(MAKE) --no-print-directory tests-build
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BUILD)/test_samba --gtest_filter='*Gpu*' --gtest_brief=1
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BUILD)/test_samba --gtest_filter='*Gpu*' --gtest_brief=1

.PHONY: golden
golden: ## The golden files alone (SAMBA_GOLDEN_DIR=DIR: any directory of such files)
	@$(MAKE) --no-print-directory tests-build
	@$(BUILD)/test_samba --gtest_filter='Golden*' --gtest_brief=1

# ---------------------------------------------------------------------------------------------------------------------
##@ Measure

# Every program checks itself. Those of a GPU say so and end where there is none.
.PHONY: ladder ladder-run
ladder: ## dev/ladder/: from the plain loop to the final kernel, a program for each idea; builds and runs all, one table
ifeq ($(NVCC),)
	@echo "error: make ladder needs the CUDA compiler nvcc and finds none; install the CUDA Toolkit or add it to PATH" >&2; exit 1
else
	@$(MAKE) --no-print-directory CPU=0 PRECISION=BF16 ladder-run
endif
ladder-run: $(BUILD)/ladder-programs
	@for program in $(LADDER); do $$program || exit 1; done

# MODEL=samba-1.3b MICRO_BATCH=4: another model or size
MODEL ?= samba-421m
MICRO_BATCH ?= 8

.PHONY: bench
bench: ## A training step of Samba-421M and 1.3B: tokens/s, share of the peak, memory, a table of every operation
	@$(MAKE) --no-print-directory $(BUILD)/train_samba
	@$(BUILD)/train_samba bench --model samba-421m --micro-batch 8
	@echo
	@$(BUILD)/train_samba bench --model samba-1.3b --micro-batch 4

.PHONY: profile
profile: ## Nsight Systems on a few steps, a range for each layer and operation (MODEL=, MICRO_BATCH=): build/profile.nsys-rep
	@command -v nsys >/dev/null || { echo "error: nsys is missing: install NVIDIA Nsight Systems"; exit 1; }
	@$(MAKE) --no-print-directory $(BUILD)/train_samba
	nsys profile --trace cuda,nvtx --force-overwrite true --output build/profile $(BUILD)/train_samba bench \
	    --model $(MODEL) --micro-batch $(MICRO_BATCH) --graphs off --repeats 2 --accumulate 1

# TORCH_PYTHON: one that has PyTorch, mamba_ssm and causal_conv1d
TORCH_PYTHON ?= python3

.PHONY: bench-torch
bench-torch: ## The same model in PyTorch with mamba_ssm and FlashAttention-2, then this one, on one GPU; and the ratio (MODEL=, MICRO_BATCH=)
	@$(MAKE) --no-print-directory $(BUILD)/train_samba
	@$(TORCH_PYTHON) dev/parity/run.py bench --program $(BUILD)/train_samba --model $(MODEL) --micro-batch $(MICRO_BATCH)

.PHONY: parity
parity: ## The same weights and batches through this and PyTorch for 50 steps: losses and gradient norms (DATASET=, MODEL=, MICRO_BATCH=)
	@$(MAKE) --no-print-directory $(BUILD)/train_samba
	@$(TORCH_PYTHON) dev/parity/run.py parity --program $(BUILD)/train_samba --model $(MODEL) --micro-batch $(MICRO_BATCH) --data '$(DATA)/train_*.bin'

.PHONY: bench-ops
bench-ops: ## Every operation of a Samba-421M step alone, on this GPU: ms, GB/s, TFLOP/s
	@$(MAKE) --no-print-directory $(BUILD)/bench_ops
	@$(BUILD)/bench_ops

.PHONY: bench-scan
bench-scan: ## Selective scan and convolution at the shapes of training: errors, ms, GB/s, % of what bounds them
	@$(MAKE) --no-print-directory $(BUILD)/bench_scan
	@$(BUILD)/bench_scan

.PHONY: bench-scaling
bench-scaling: setup ## Several GPUs of this machine: the same training on any number, speed, collectives alone; table and plot in dev/results
	@$(MAKE) --no-print-directory $(BUILD)/train_samba $(BUILD)/bench_comm
	@$(PYTHON) dev/bench/scaling_check.py --program $(BUILD)/train_samba $(SCALING)

# The Python that has PyTorch, if there is one; .venv does not
PEERS_PYTHON ?= python3
.PHONY: bench-attention
bench-attention: ## Attention's paths: ms, TFLOP/s on useful pairs, errors; PyTorch's two where it is installed
	@$(MAKE) --no-print-directory $(BUILD)/bench_attention
	@$(BUILD)/bench_attention
	@$(PEERS_PYTHON) dev/bench/attention_peers.py

.PHONY: bench-loader
bench-loader: ## Tokens/s of the DataLoader with a warm page cache
	@$(MAKE) --no-print-directory $(BUILD)/bench_loader
	@$(BUILD)/bench_loader

.PHONY: bench-generate
bench-generate: setup ## Tokens/s of writing and of reading a prompt against context length, Samba and full attention: JSON and plot
	@$(MAKE) --no-print-directory $(BUILD)/bench_generate
	@mkdir -p out/bench
	@$(BUILD)/bench_generate --contexts 1k,2k,4k,8k,16k,32k,64k,128k,1m --prompts 1k,2k,4k,8k,16k,32k,64k,128k --out out/bench/generate.json
	@$(PYTHON) dev/bench/plot_generate.py out/bench/generate.json --out out/bench/generate.png

.PHONY: bench-prepare
bench-prepare: setup ## Tokens/s and memory of data.prepare on 1 GB, beside a plain SentencePiece loop
	@$(PYTHON) dev/bench/bench_prepare.py

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@sed -n '3,7s/^#  /  /p' $(firstword $(MAKEFILE_LIST))
