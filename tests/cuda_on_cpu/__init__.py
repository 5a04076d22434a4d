"""The CUDA kernels on a CPU: harness.py compiles csrc/cuda by a C++ compiler and runs it, cases.py lists the calls
with their results in float64 (stats_cases.py, loss_cases.py), mutations.py the bugs that must be found. The tests:
../csrc/test_cuda_on_cpu.py.
"""
