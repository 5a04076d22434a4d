"""What somebody is told who has no verl, or not what it builds on: by an import, and by the plugin."""

from __future__ import annotations

import subprocess
import sys

MISSING = """
import sys, warnings
sys.modules["verl"] = None  # what `import verl` finds where it is not installed
warnings.simplefilter("error")
for name in ("verl", "verl_plugin"):
    try:
        __import__(f"edge_grpo.integrations.{name}")
    except (ImportError, UserWarning) as told:
        print(told)
"""


def test_both_name_what_is_missing_and_the_remedy():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    told = (
        "edge_grpo.integrations.verl needs verl and what it builds on; verl is not installed; in an environment of its "
        "own: pip install 'edge-grpo[verl]'"
    )
    assert done.stdout.splitlines() == [told, f"trainer.v1.trainer_mode=edge_sync is not available: {told}"]
