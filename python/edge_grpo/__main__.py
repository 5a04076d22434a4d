"""``python -m edge_grpo`` is ``edge-grpo``; ``accelerate launch -m edge_grpo train ...`` needs it."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
