#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds the extension with its CUDA kernels, runs every GPU test against float64
# references, then the benchmarks; a short table last, JSON in benchmarks/results. Needs a Python with torch, Triton, pybind11,
# CMake and pytest, nvcc, and no network. The same command goes on where it was stopped.
#
#   benchmarks/gpu.sh              all of it, in less than ten minutes
#   benchmarks/gpu.sh --fresh      again from the beginning
#   benchmarks/gpu.sh --only hvp   the contests with "hvp" in their names, after their tests
#   benchmarks/gpu.sh --dry        on the CPU, to try the harness
#   PYTHON=…                       the interpreter; .venv's, or python3, unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
PARL_GPU_BEGAN=$(date +%s) exec "$python" -m benchmarks.gpu "$@"
