"""`aerie generate`."""

import json
import sys

import typer

from aerie import plotting, report
from aerie.commands.generate_options import GenerateOptions
from aerie.commands.shared import exit_code_2_on_bad_input, stderr, stdout
from aerie.run import load, run


def generate(options: GenerateOptions) -> None:
    """Decode a prompt speculatively, and show what the draft was worth."""
    with exit_code_2_on_bad_input():
        if options.plot is not None:
            plotting.check(options.plot)
        request = options.request()
        loaded = load(request, stderr)
        if loaded.draft is None and not options.no_draft:
            stderr.print("No draft given (--draft): plain decoding.")
        outcome = run(request, loaded, on_text=None if options.as_json else _print_now)
        if options.plot is not None:
            plotting.draw(outcome.stats, options.plot)
    if options.as_json:
        print(json.dumps(report.as_dict(outcome)))
    else:
        stdout.print()
        stdout.print(report.as_table(outcome))
    if outcome.identical is False:
        stderr.print(report.first_difference(outcome))
        raise typer.Exit(1)


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
