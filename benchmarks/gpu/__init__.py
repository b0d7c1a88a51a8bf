"""What `benchmarks/gpu.sh` runs on a machine with an NVIDIA GPU: build, tests, contests, a table.

__main__        the steps, in order, within a number of minutes
store           what is done, on disk, so that the same command goes on where it was stopped
build           the extension with its CUDA kernels, in place
tests           every test of a kernel for GPUs, a process for each file
contests        runs the cases in a process of their own, and a new one after each that broke it
worker          that process
case, cases/    the contests: problem, contestants, floor, and the bar that is to be met
report          the table, benchmarks/results/gpu-*.json, docs/gpu.md
choose          parl_core/ops/choice.json from the results
"""
