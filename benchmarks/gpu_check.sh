#!/usr/bin/env bash
# On a machine with a GPU, in its own Python environment: install, prove, time. One JSON and one table in the folder OUT.
#   make gpu-check [PYTHON=python3] [OUT=benchmarks/results] [PEERS="--peer-path var=VAR --peer-path llamagen=LlamaGen"]
# Under ten minutes on one GPU. A failing part does not keep the later ones from running; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-benchmarks/results} failed=0
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))" 2>/dev/null) ||
  { echo "error: PyTorch of $python sees no GPU; set PYTHON to a Python whose PyTorch does" >&2; exit 1; }
name=gpu-$gpu
step() { printf '\n[%(%H:%M:%S)T] %s\n' -1 "$1"; shift; "$@" || { failed=1; echo "FAILED: $*"; }; }

mkdir -p "$out"
step "install into this environment's PyTorch" "$python" -m pip install -q --no-build-isolation --no-deps . || exit 1
step "which backends there are" "$python" -m ddfast.doctor
parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
# shellcheck disable=SC2086
step "correctness" timeout 240 "$python" -m pytest -q -m gpu tests/gpu $parallel
if command -v compute-sanitizer >/dev/null; then
  some="cuda and (ties or bad_rows or noise or strides)"
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -m gpu tests/gpu -k "$some"
  done
fi
step "benchmarks" timeout 300 "$python" -m pytest benchmarks/test_gpu_kernels.py --benchmark-only -q -s \
  --benchmark-json "$out/$name.json"
step "the score in an update of DD2" env DDFAST_BACKEND=triton timeout 120 "$python" -m pytest \
  benchmarks/test_dd2_score.py --benchmark-only -q -s --benchmark-json "$out/$name-dd2-score.json"
# Interrupted, pytest still writes what it has measured.
# shellcheck disable=SC2086
step "decoding" env DDFAST_BACKEND=triton timeout -s INT -k 20 240 "$python" -m pytest benchmarks/test_decode.py \
  --benchmark-only -q -s --benchmark-json "$out/$name-decode.json" ${PEERS:-}
step "table" "$python" benchmarks/table.py "$out/$name.json" "$out/$name-decode.json"
exit $failed
