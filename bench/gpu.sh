#!/usr/bin/env bash
# One call on a machine with an NVIDIA GPU: compiles for that GPU and measures, checks and trains there. Under 9 minutes on 16 cores.
#
#   bench/gpu.sh [FOLDER]                  writes log.txt, rows.jsonl and report.md there, by default into build/gpu
#   STAGES="decide core" bench/gpu.sh      some stages; each is of use alone
#   PYTHON=.venv/bin/python                which Python: one with a CUDA build of torch from 2.10 on
#   WHEELS=FOLDER                          wheels that it lacks, put beside it; docs/benchmarks.md has the command that downloads them
#   PATIENCE=3                             all limits, and the budget, times as much
#   DEVICE=cpu QUICK=1                     a rehearsal: small shapes, no GPU
#   STAGES=autotune bench/gpu.sh           goes on with max-autotune where a call with the same FOLDER was stopped
#
# decide    what plans rest on: how fast L2 is read, mma.sync beside the library's product, launches, what programmatic dependent launch
#           gains, and what Nsight Compute counts, if it is there
# core      edited_attention at every shape of three UNets beside torch's attention kernels, torch.compile and the expert; then the others
# layer     the whole cross-attention layer, likewise
# engine    a step of a UNet of Stable Diffusion 1.5's shape, in float16
# sanitize  programs on the C API and tests under compute-sanitizer
# tests     the operators' tests, on the GPU
# train     a step of training
# autotune  torch.compile's max-autotune at all shapes of both that core and layer did not come to, in the time that is left: the layers
#           that move most in a step first. As the last stage it has the whole budget. What is compiled stays in build/gpu-scratch
#
# A stage is steps with limits in seconds, which add up to no more than the budget; what a step leaves over, a later one may use. A step
# runs whatever became of those before it. Numbers need no green step elsewhere: nothing is timed that did not pass its own check. The
# status is 1 if a step failed or a kernel of ours was wrong, 2 if there is no GPU. A step of max-autotune that time cuts short has not
# failed: it is named at the end as not finished, its rows stay, the report names the shapes without one, and the next call with the same
# FOLDER measures those alone.
set -euo pipefail
cd "$(dirname "$0")/.."

budget=530 patience=${PATIENCE:-1}
known="decide core layer engine sanitize tests train autotune"
stages=${STAGES:-$known} device=${DEVICE:-cuda} python=${PYTHON:-python3} failed=() unfinished=()
out=$(realpath -m "${1:-build/gpu}") scratch=$PWD/build/gpu-scratch
log=$out/log.txt rows=$out/rows.jsonl

refuse() { echo "bench/gpu.sh: $1" >&2; exit 2; }
for stage in $stages; do
  [[ " $known " == *" $stage "* ]] || refuse "there is no stage $stage; there are: $known"
done
last=${stage:-}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc, ncu and compute-sanitizer
gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2> /dev/null | head -n 1) || true
[[ $gpu == *,* ]] || refuse "no NVIDIA GPU here (nvidia-smi lists none), and nothing that this script does makes sense without one."

mkdir -p "$out" "$scratch"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$WHEELS"/*.whl > "$scratch/wheels.log" 2>&1 ||
    refuse "the wheels in $WHEELS cannot be installed: $(tail -n 1 "$scratch/wheels.log")"
  export PYTHONPATH=$PWD:$PWD/python:$scratch/site${PYTHONPATH#"$PWD:$PWD/python"} PATH=$scratch/site/bin:$PATH
fi
[[ $device == cpu ]] || "$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
  refuse "$python has no torch that sees the GPU; PYTHON=... names another one."

capability=${gpu##*, }
export TORCH_CUDA_ARCH_LIST=$capability MAX_JOBS=${MAX_JOBS:-$(nproc)} PERFUSION_CUDA=1 MICROBENCHMARKS=$scratch/libmicrobenchmarks.so
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
echo "$gpu; log, rows and report in $out" | tee -a "$log"

# step NAME SECONDS COMMAND..., with resumable=1 before it if the next call goes on where time cut it short
granted=$SECONDS # when the steps so far have to be over
step() {
  local name=$1 own=$(($2 * patience)) begin=$SECONDS left=$((budget * patience - SECONDS)) result=0 over='' status
  shift 2
  granted=$((granted + own))
  local limit=$((granted - begin))
  ((limit > own)) || limit=$own
  ((limit < left)) || limit=$left
  printf '\n==> %s: %s\n' "$name" "$*" >> "$log"
  if ((limit < 1)); then
    result=1 over=1 status="not begun, the $((budget * patience)) s are over"
  elif ! command -v "$1" > /dev/null; then
    result=1 status="not begun, $1 is not on PATH"
  else
    # INT, at which pytest names what has failed so far, and bench/run.py what it did not come to
    timeout ${resumable:+--preserve-status} --signal=INT --kill-after=5 "$limit" "$@" >> "$log" 2>&1 || result=$?
    ((SECONDS - begin < limit || result == 1)) || over=1 # 1: there is an error to tell, whatever the time
    status="FAILED with status $result after $((SECONDS - begin)) of $limit s; in the log: $(tail -n 1 "$log")"
  fi
  if ((result == 0)); then
    status="passed in $((SECONDS - begin)) s"
  elif [[ -n ${resumable:-} && -n $over ]]; then
    unfinished+=("$name") status=${status/FAILED with status $result/cut short}
  else
    failed+=("$name")
  fi
  echo "$name: $status" | tee -a "$log"
}

# measure NAME SECONDS OPTIONS...
measure() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" bench/run.py --device "$device" ${QUICK:+--quick} --seconds 0.1 --rounds 10 --out "$rows" "$@"
}

# autotune NAME SECONDS OPTIONS...: --missing, and beside cuda and the experts alone, since an earlier step measured the others
autotune() {
  resumable=1 measure "$@" --places 0 --rows 2 --rows 16 --compile max-autotune --missing
}

report() {
  [[ -e $rows ]] || return 0
  timeout $((10 * patience)) "$python" bench/report.py "$rows" > "$out/report.md" 2>> "$log" || failed+=("report")
}

shapes=(--model sd15 --model sdxl)
all=("${shapes[@]}" --model sd21 --rows 2 --rows 16 --compile none)
main=("${shapes[@]}" --tokens 4096 --tokens 1024) # where most of the time is
if [[ $device == cpu ]]; then needed=reference; else needed="cuda triton"; fi

step library 85 "$python" setup.py -q build_cuda --inplace
# shellcheck disable=SC2086
step backends 10 "$python" -c "import sys, perfusion_kernels
found = perfusion_kernels.available_backends()
print(*found, sep='\n', flush=True)
sys.exit('; '.join(str(each) for each in found if each.name in sys.argv and not each.available) or 0)" $needed
for stage in $stages; do
  case $stage in
    decide)
      step microbenchmarks 15 "$python" bench/microbenchmarks/__init__.py --architecture "$capability" --out "$scratch"
      measure decide 20 --suite decide
      for wish in 0 1; do
        PERFUSION_DEPENDENT_LAUNCH=$wish measure "dependent-launch-$wish" 10 --suite attention --places 0 "${shapes[@]}" --tokens 1024 --rows 2 \
          --compile none
      done
      step nsight 30 "$python" bench/nsight.py --out "$rows"
      ;;
    core)
      measure core 38 --suite attention --places 0 "${all[@]}"
      measure others 25 --suite gates --suite fused --suite projection "${shapes[@]}" --rows 2 --rows 16 --places 1 --compile none
      measure gradients 12 --suite gradients "${shapes[@]}" --rows 2 --compile none
      measure core-edited 12 --suite attention --places 1 "${main[@]}" --rows 2 --compile none
      autotune core-autotune 20 --suite attention "${main[@]}"
      ;;
    layer)
      measure layer 32 --suite layer "${all[@]}"
      autotune layer-autotune 20 --suite layer "${main[@]}"
      ;;
    engine)
      measure engine 25 --suite step --model sd15 --compile none --dtype float16
      ;;
    sanitize)
      # the objects that the step library has compiled
      step programs 15 bash -ec "
        cmake -G Ninja -S . -B 'build/cuda/$capability' -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE='$(command -v "$python")'
        cmake --build 'build/cuda/$capability' --target perfusion_kernels --parallel $MAX_JOBS
        cmake --install 'build/cuda/$capability' --prefix '$scratch/installed'
        cmake -G Ninja -S csrc/example -B '$scratch/example' -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH='$scratch/installed'
        cmake --build '$scratch/example'"
      # first with the plans of one multiprocessor, which are those of many rows: tiles of 32 rows, and blocks that go on from head to head
      for tool in memcheck racecheck synccheck initcheck; do
        step "$tool" 12 bash -c "
          status=0
          check() { compute-sanitizer --tool $tool --error-exitcode 9 '$scratch/example/'\"\$@\" || status=\$?; }
          PERFUSION_MULTIPROCESSORS=1 check sweep dense
          PERFUSION_MULTIPROCESSORS=1 check sweep dense 160 edited_attention fused_edited_attention
          check sweep
          check example
          exit \$status"
      done
      # without torch's allocator, behind whose blocks a read out of bounds meets memory that is allocated
      step memcheck-tests 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -x -p no:cacheprovider tests/kernels/test_floor.py -k "cuda-cuda and (odd_sizes or poisoned_memory)"
      ;;
    tests)
      for backend in cuda triton; do
        step "tests-$backend" 22 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_floor.py tests/kernels/test_identities.py \
          tests/kernels/test_traps.py tests/kernels/test_edited_attention.py tests/kernels/test_concept_gates.py -k "$backend-cuda"
      done
      ;;
    train)
      measure train 13 --suite train --model toybox --compile none
      ;;
    autotune)
      # no step follows: it has all but the report's time; its own is added by the step
      [[ $last != autotune ]] || granted=$(((budget - 10 - 11) * patience))
      unfinished=() # which it asks again
      autotune autotune 11 --suite attention --suite layer "${shapes[@]}" --model sd21
      ;;
  esac
done
report

echo "$SECONDS s in all." | tee -a "$log"
((${#unfinished[@]} == 0)) || echo "Not finished: ${unfinished[*]}. The report names the shapes that have no row of max-autotune yet;" \
  "STAGES=autotune bench/gpu.sh $out goes on with them." | tee -a "$log"
((${#failed[@]} == 0)) || { echo "Failed: ${failed[*]}" | tee -a "$log" >&2; exit 1; }
