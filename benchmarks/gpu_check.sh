#!/usr/bin/env bash
# On a machine with a GPU, in its own Python environment: install, prove, time. One JSON and one table in the folder OUT.
#   make gpu-check [PYTHON=python3] [OUT=benchmarks/results] [STEPS="install correctness sanitizer kernels score decoding"]
#                  [PEERS="--peer-path var=VAR --peer-path llamagen=LlamaGen"]
# Under ten minutes on one GPU; STEPS does it in parts. A failing part does not keep the later ones from running; the
# exit code tells. A benchmark that runs out of its time still writes what it has measured.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-benchmarks/results} steps=${STEPS:-install correctness sanitizer kernels score decoding}
failed=0
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))" 2>/dev/null) ||
  { echo "error: PyTorch of $python sees no GPU; set PYTHON to a Python whose PyTorch does" >&2; exit 1; }
name=gpu-$gpu
wanted() { [[ " $steps " == *" $1 "* ]]; }
step() { printf '\n[%(%H:%M:%S)T] %s\n' -1 "$1"; shift; "$@" || { failed=1; echo "FAILED: $*"; }; }
bench() { timeout -s INT -k 20 "$1" "$python" -m pytest "benchmarks/$2" --benchmark-only -q -s --benchmark-json "$out/$3" "${@:4}"; }

mkdir -p "$out"
if wanted install; then
  step "install into this environment's PyTorch" "$python" -m pip install -q --no-build-isolation --no-deps . || exit 1
fi
step "which backends there are" "$python" -m ddfast.doctor
if wanted correctness; then
  parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
  # shellcheck disable=SC2086
  step "correctness" timeout 240 "$python" -m pytest -q -m gpu tests/gpu $parallel
fi
if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
  some="cuda and (ties or bad_rows or noise or strides)"
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -m gpu tests/gpu -k "$some"
  done
fi
if wanted kernels; then step "kernels" bench 300 test_gpu_kernels.py "$name.json"; fi
export DDFAST_BACKEND=triton  # for what asks for no backend by name
if wanted score; then step "the score in an update of DD2" bench 120 test_dd2_score.py "$name-dd2-score.json"; fi
# shellcheck disable=SC2086
if wanted decoding; then step "decoding" bench 240 test_decode.py "$name-decode.json" ${PEERS:-}; fi
for file in "$out/$name.json" "$out/$name-decode.json"; do
  if [[ -e $file ]]; then step "table" "$python" benchmarks/table.py "$file"; fi
done
exit $failed
