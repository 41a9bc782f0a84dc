"""`aerie generate`."""

import json
import sys

import typer

from aerie import plotting, report
from aerie.batch_run import run_batch
from aerie.commands.generate_options import GenerateOptions
from aerie.commands.shared import exit_code_2_on_bad_input, stderr, stdout
from aerie.run import Outcome, load, run


def generate(options: GenerateOptions) -> None:
    """Decode a prompt speculatively, and show what the draft was worth."""
    with exit_code_2_on_bad_input():
        if options.plot is not None:
            plotting.check(options.plot)
        request = options.request()
        loaded = load(request, stderr)
        if loaded.draft is None and not options.no_draft:
            stderr.print("No draft given (--draft): plain decoding.")
        if request.prompts:
            _show_batch(run_batch(request, loaded, _tell_progress), options.as_json)
            return
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


def _show_batch(outcomes: list[Outcome], as_json: bool) -> None:
    """In the order of the prompts; as JSON one list."""
    if as_json:
        print(json.dumps([report.as_dict(outcome) for outcome in outcomes]))
    else:
        for number, outcome in enumerate(outcomes, start=1):
            stdout.rule(f"prompt {number}", align="left")
            print(outcome.text)
            stdout.print(report.as_table(outcome))
    different = [outcome for outcome in outcomes if outcome.identical is False]
    for outcome in different:
        stderr.print(report.first_difference(outcome))
    if different:
        raise typer.Exit(1)


def _tell_progress(ended: int, count: int) -> None:
    stderr.print(f"{ended} of {count} prompts done")


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
