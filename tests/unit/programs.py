"""Programs beside the tests that need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def printed_by(name: str, *arguments: str) -> Any:
    """What the program of this name in this folder prints as JSON."""
    program = Path(__file__).with_name(name)
    root = program.parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), *arguments],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
