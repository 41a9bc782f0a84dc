"""`aerie generate`."""

import json
import sys
from dataclasses import replace

import typer
from torch.distributed import ProcessGroup

from aerie import plotting, ranks, report
from aerie.batch_run import run_batch
from aerie.commands.generate_options import GenerateOptions
from aerie.commands.shared import exit_code_2_on_bad_input, stderr, stdout
from aerie.loading import load
from aerie.request import Request
from aerie.run import Outcome, run


def generate(options: GenerateOptions) -> None:
    """Decode a prompt speculatively, and show what the draft was worth."""
    if ranks.rank() > 0:  # what all of them know is said once; errors, by whoever has one
        for console in (stdout, stderr):
            console.quiet = True
    with exit_code_2_on_bad_input():
        if options.plot is not None:
            plotting.check(options.plot)
        request = options.request()
        with ranks.started(request.tensor_parallel_size, request.device) as group:
            _generate(
                options, replace(request, sampling=ranks.agreed(request.sampling, group)), group
            )


def _generate(options: GenerateOptions, request: Request, group: ProcessGroup | None) -> None:
    is_first, loaded = ranks.rank() == 0, load(request, stderr, group)
    if loaded.draft is None and not options.no_draft:
        stderr.print("No draft given (--draft): plain decoding.")
    if request.prompts:
        batch = run_batch(request, loaded, stderr)
        if is_first and options.plot is not None:
            plotting.draw_batch([one.stats for one in batch.outcomes], batch.rounds, options.plot)
        if is_first:
            _show_batch(batch.outcomes, options.as_json)
        return
    is_streaming = is_first and not options.as_json
    outcome = run(request, loaded, _print_now if is_streaming else None, stderr)
    if not is_first:
        return
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
    errors = [(i, outcome.error) for i, outcome in enumerate(outcomes, start=1) if outcome.error]
    for number, error in errors:
        stderr.print(f"prompt {number}: {error}", markup=False, soft_wrap=True)
    if different or errors:
        raise typer.Exit(1 if different else 2)


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
