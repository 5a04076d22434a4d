"""``python -m edge_grpo`` is ``edge-grpo``; ``accelerate launch -m edge_grpo train ...`` needs it."""

from edge_grpo.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
