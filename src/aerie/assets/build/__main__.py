"""Command line of the rebuild: all stages in order, or some of them again."""

import argparse
import sys
import time
from pathlib import Path

from aerie.assets.build import stages

STAGES = ("text", "target", "distill", "draft", "joint", "acceptance", "notice")


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
        help="stages to run; later ones read what earlier ones left in --out",
    )
    return parser.parse_args(arguments)


def run(stage: str, options: argparse.Namespace) -> None:
    """Run one stage by name."""
    out, seed, device = options.out, options.seed, options.device
    match stage:
        case "text":
            stages.build_text(out)
        case "target":
            stages.build_target(out, seed, device)
        case "distill":
            stages.build_distilled(out, seed, device)
        case "draft":
            stages.build_draft(out, seed, device)
        case "joint":
            stages.build_jointly(out, seed, device)
        case "acceptance":
            stages.report_acceptance(out, device)
            stages.remove_distilled(out)
        case "notice":
            stages.refresh_checksums(out)


def main() -> None:
    """Run the chosen stages in pipeline order."""
    options = parse(sys.argv[1:])
    for stage in STAGES:
        if stage in options.stages:
            started = time.monotonic()
            run(stage, options)
            print(f"{stage}: {time.monotonic() - started:.0f}s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
