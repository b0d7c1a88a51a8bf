"""What `parl bench` shows: results of the benchmarks, their comparison, and README's table of them.

The benchmarks themselves are in a checkout's `benchmarks/`, which is not installed.
"""
