"""The benchmark for a GPU, ``python -m benchmarks.gpu``; what compilers make of the kernels is ../gpu_static.py's.

inputs.py: what is run; device.py: the clock and the memory; checks.py: correctness; contenders.py: the peers;
head_ways.py: the ways of our head; times.py: times and their table; __main__.py: one after the other.
"""
