"""A cost model of one step of EDGE-GRPO on 1 to 64 GPUs: ``python -m benchmarks.scaling``, written to docs/scaling.md.

cluster.py has the numbers of the machine and what is assumed of it; transformer.py a model's parameters, products and
bytes; job.py what a run's keys ask for; collectives.py what processes send; memory.py what a GPU holds; step.py what a
step takes, and the choice of a layout; tables.py the page. Nothing in these needs a GPU, and none has measured them.
processes.py runs shrunken models on CPU processes and counts what they send and hold, and measured.py lays that beside
the model's numbers.
"""
