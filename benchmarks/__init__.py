"""Time, memory and error of the kernels against their peers and the machine's limits: ``python -m benchmarks``.

harness.py runs configurations and prints results; peers.py has the contenders, limits.py the machine's limits.
logits.py, head.py, memory.py, accuracy.py and end_to_end.py are the benchmarks; grading.py and rollout.py measure the
training package, trl_step.py TRL's trainer with it. gpu/ runs on a GPU; machine_code/ and gpu_static.py inspect GPU
kernels without one. scaling/ runs nothing: it computes what a step costs on up to 64 GPUs, for docs/scaling.md.
"""
