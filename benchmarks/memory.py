"""Peak memory of the fused LM head besides its inputs and their gradients, over the number of tokens.

The head is narrow: the memory of interest has size N x V, whatever the hidden width, and a narrow one saves time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import head, peers
from benchmarks.harness import COMPILED, OURS, Config, Result, main


def configs(quick: bool) -> Sequence[Config]:
    base: Config = {"dtype": "float32", "vocab": 151_936, "hidden": 64, "pages": "ordinary", "repetitions": 0}
    if quick:
        return [{**base, "vocab": 49_152, "rows": 256, "contenders": [COMPILED]}]
    everybody, few = [COMPILED, peers.TRL_HEAD, peers.VERL, peers.LIGER, peers.CUT], [COMPILED, peers.TRL_HEAD]
    sizes = [(512, everybody), (4096, few), (16_384, [OURS])]
    return [{**base, "rows": rows, "contenders": names} for rows, names in sizes]


def measure(config: Config) -> list[Result]:
    results = head.measure({**config, "memory_only": True, "skip_plain": config["rows"] > 1024})
    return [{**result, "work": "memory of the head"} for result in results]


if __name__ == "__main__":
    sys.exit(main("memory", __doc__, configs))
