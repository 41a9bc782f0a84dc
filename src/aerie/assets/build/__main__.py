"""Command line of the rebuild: all stages in order, or some of them again."""

import argparse
import sys
import time
from pathlib import Path

from aerie.assets.build.stages import STAGES, Rebuild


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m aerie.assets.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="stages to run; later ones read what earlier ones left in OUT/unfinished",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run the chosen stages in pipeline order."""
    options = parse(sys.argv[1:])
    rebuild = Rebuild(options.out, options.seed, options.device)
    for name in STAGES:
        if name in options.stages:
            wall, cpu = time.monotonic(), time.process_time()
            getattr(rebuild, name)()
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            print(f"{name}: {wall:.0f} s, CPU {cpu:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
