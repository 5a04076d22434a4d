"""The CUDA kernels on a CPU: harness.py compiles csrc/cuda by a C++ compiler and runs it, cases.py holds the results
against float64, mutations.py holds the bugs that must be found. The tests themselves: ../test_cuda_on_cpu.py.
"""
