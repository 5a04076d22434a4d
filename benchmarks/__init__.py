"""Time, memory and error of the kernels against their peers and the machine's limits. ``python -m benchmarks`` is all.

harness.py runs configurations and prints them; peers.py knows the contenders, limits.py the machine's limits;
logits.py, head.py, memory.py, accuracy.py and end_to_end.py are the benchmarks.
"""
