#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU: builds for that GPU, runs the tests there, asks compute-sanitizer, and measures. Under 9 minutes.
#
#   bench/gpu.sh [FOLDER]        logs and rows go to FOLDER, by default build/gpu
#   PYTHON=.venv/bin/python      which Python: with a CUDA build of torch and this package's test and train extras
#   MODELS="sd15 sdxl" ROWS="2 16" SECONDS_EACH=0.2      what is measured, and for how long each contestant of a case
#
# Every stage has a limit of its own and a log, and runs whatever became of those before it, so that one call tells all; the exit
# status is 1 if any failed, 2 if there is nothing to run on. No number needs a green stage elsewhere: bench/run.py times nothing whose result it has not checked.
set -euo pipefail
cd "$(dirname "$0")/.."

budget=530 # seconds for everything
python=${PYTHON:-python3} out=$(realpath -m "${1:-build/gpu}") failed=()

refuse() { echo "bench/gpu.sh: $1" >&2; exit 2; }
gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2> /dev/null | head -n 1) || true
[[ $gpu == *,* ]] || refuse "no NVIDIA GPU here (nvidia-smi lists none), and nothing that this script does makes sense without one."
for tool in nvcc compute-sanitizer cmake ninja; do
  command -v "$tool" > /dev/null || refuse "$tool is not on PATH. The CUDA toolkit brings nvcc and compute-sanitizer, pip cmake and ninja."
done
"$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
  refuse "$python has no torch that sees the GPU; PYTHON=... names another one."

capability=${gpu##*, }
export TORCH_CUDA_ARCH_LIST=$capability MAX_JOBS=${MAX_JOBS:-$(nproc)} PERFUSION_CUDA=1 PYTHONPATH=$PWD:$PWD/python
mkdir -p "$out"
echo "$gpu, compute capability $capability; logs and rows in $out"

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 begin=$SECONDS left=$((budget - SECONDS)) status=0
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 1)); then
    failed+=("$name")
    echo "$name: not begun, the $budget s are over"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  if ((status == 0)); then
    echo "$name: passed in $((SECONDS - begin)) s"
  else
    failed+=("$name")
    echo "$name: FAILED with status $status ($((SECONDS - begin)) of $limit s); the end of $out/$name.log:"
    tail -n 5 "$out/$name.log"
  fi
}

example() {
  local cmake=$out/cmake
  cmake -S . -B "$cmake" -DCMAKE_CUDA_ARCHITECTURES="${capability/./}-real" -DCMAKE_INSTALL_PREFIX="$out/installed"
  cmake --build "$cmake" --parallel "$MAX_JOBS"
  cmake --install "$cmake"
  cmake -S csrc/example -B "$out/example" -DCMAKE_PREFIX_PATH="$out/installed"
  cmake --build "$out/example"
}
export -f example
export out capability

stage build 150 "$python" -m pip install --no-build-isolation --no-deps --editable .
stage example-build 90 bash -ec example
stage doctor 20 "$python" -c 'from perfusion.cli import main; main()' doctor
stage example 10 "$out/example/example"
# what runs on the GPU: mutants and compile-only tests need none
stage tests 120 "$python" -m pytest -q -n 4 tests/kernels --deselect tests/kernels/test_compile_matrix.py -k "not mutant"
for tool in memcheck racecheck; do
  stage "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$out/example/example"
done
stage memcheck-tests 40 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
  "$python" -m pytest -q -x tests/kernels/test_floor.py -k "cuda and (odd_sizes or poisoned_memory)"

models=() rows=()
for model in ${MODELS:-sd15 sdxl}; do models+=(--model "$model"); done
for count in ${ROWS:-2 16}; do rows+=(--rows "$count"); done
for suite in gates projection attention fused layer; do
  stage "bench-$suite" 60 "$python" bench/run.py --suite "$suite" "${models[@]}" "${rows[@]}" \
    --seconds "${SECONDS_EACH:-0.2}" --rounds 10 --out "$out/$suite.jsonl"
done
stage bench-overhead 20 "$python" bench/run.py --suite overhead --out "$out/overhead.jsonl"
files=("$out"/*.jsonl)
[[ -e ${files[0]} ]] && "$python" bench/report.py "${files[@]}" | tee "$out/report.md"

echo "$SECONDS s in all."
((${#failed[@]} == 0)) || { echo "Failed: ${failed[*]}" >&2; exit 1; }
