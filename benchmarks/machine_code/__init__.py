"""GPU machine code without a GPU: kernels compiled ahead of time, and what their instructions say.

aot.py compiles what launchers launch, and CUDA sources; ours.py and peers.py are the launches; cubin.py reads what came
out (instructions.py, loops.py). The tables are ../gpu_static.py's.
"""
