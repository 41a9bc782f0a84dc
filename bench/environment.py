"""Where a row was measured: device, driver, versions, commit, and the clocks at that moment."""

import subprocess
from hashlib import sha256
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]


def describe(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """What every row carries beside its numbers. `commit` speaks for a copy without git."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "driver": _smi(device, "driver_version") or "none",
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "commit": commit or _commit(),
        "source": source_digest(),
    }


def clocks(device: torch.device) -> str:
    """SM and memory clock, power and temperature now; "unknown" where nothing answers."""
    return _smi(device, "clocks.sm,clocks.mem,power.draw,temperature.gpu") or "unknown"


def source_digest() -> str:
    """Names the code that ran, also between commits: kernels, references, and what tests them."""
    digest, folders = sha256(), ("kernels", "tests", "tests/kernels")
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    return _output(["git", "describe", "--always", "--dirty", "--exclude=*"]) or "not a checkout"


def _smi(device: torch.device, query: str) -> str:
    if device.type != "cuda":
        return ""
    uuid = torch.cuda.get_device_properties(device).uuid
    return _output(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"-i=GPU-{uuid}"]
    )


def _output(command: list[str]) -> str:
    """What `command` prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'unknown CPU'}, {torch.get_num_threads()} threads"
