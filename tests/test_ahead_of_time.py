"""Every kernel compiles to machine code for GPUs that are not here, and fits their shared memory.

The interpreter knows neither types that do not lower, nor layouts, nor memory limits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ahead_of_time.py"
KERNELS = Path(__file__).parents[1] / "kernels"
SHARED_BYTES = {"cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}  # per program


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiles(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), target]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    names = {entry["kernel"] for entry in compiled}
    sources = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    missing = [f"_{p.stem}" for p in KERNELS.glob("*.py") if "tl." in p.read_text()]
    assert [stem for stem in missing if not any(name.startswith(stem) for name in names)] == []
    assert all(f"def {name}(" in sources for name in names)
    too_large = [entry for entry in compiled if entry["shared"] > SHARED_BYTES[target]]
    assert too_large == []
