"""Where things are: the checkout's root, and the data beside it that a test may use when it is there."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
