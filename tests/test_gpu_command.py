"""`make gpu` on a machine without one: its steps and limits, the stand-ins, the model of random
weights scaled down, and what follows. `python -m bench.gpu --small` runs the command whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, scout
from bench.random_model import SMALL, random_pair
from bench.report import merged
from bench.tables import scout_markdown
from tests import without_hypothesis


def test_steps_keep_their_limits_and_the_report_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    names = [task.name for task in gpu.tasks(tmp_path, small=False, commit="abc")]
    assert names[0] == "ceilings"
    assert names[-1] == "report"
    assert gpu.SECONDS <= 540
    assert not any(task.why_not for task in gpu.tasks(tmp_path, small=False))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    skipped = {task.name for task in gpu.tasks(tmp_path, small=True) if task.why_not}
    assert skipped == {"memcheck", "racecheck"}


def test_a_failing_step_stops_no_other():
    def python(code, most=30.0, why_not=""):
        return gpu.Task(code, (sys.executable, "-c", code), most, why_not)

    found = [python("exit(3)"), python("import time; time.sleep(60)", most=1.5)]
    found += [python("absent", why_not="not here"), python("print(1)", most=20)]
    outcomes = [outcome.rsplit(" (", 1)[0] for outcome in gpu.run_all(found, 40).values()]
    assert outcomes[0] == "failed: exit code 3"
    assert outcomes[1].startswith("failed: not done after")
    assert outcomes[2:] == ["skipped: not here", "ok"]
    late = gpu.run_all([python("exit(0)"), python("print(1)", most=20)], 20)
    assert late["exit(0)"].startswith("skipped: no time left")
    assert late["print(1)"].startswith("ok")


def test_benches_run_without_pytest_benchmark(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "def test_x(benchmark):\n"
        "    benchmark.extra_info['op'] = 'x'\n"
        "    assert benchmark.pedantic(lambda a: a + 1, args=(1,), rounds=3) == 2\n"
    )
    saved = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p"]
    command += ["bench.plain_benchmark", "test_x.py", f"--benchmark-json={saved}"]
    found = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=found)
    (entry,) = json.loads(saved.read_text())["benchmarks"]
    assert entry["name"] == "test_x"
    assert entry["stats"]["median"] > 0
    assert entry["extra_info"] == {"op": "x"}


def test_random_cases_are_skipped_without_hypothesis(monkeypatch):
    for name in ("hypothesis", "hypothesis.strategies"):
        monkeypatch.setitem(sys.modules, name, None)  # remembers what is there
    without_hypothesis.install()
    import hypothesis
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=3)
    @hypothesis.given(st.sampled_from([1]) | st.integers(1, 2).map(abs))
    def test_numbers(number):
        raise AssertionError

    (mark,) = vars(test_numbers)["pytestmark"]
    assert mark.kwargs == {"reason": without_hypothesis.WHY}
    assert test_numbers.__name__ == "test_numbers"


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return random_pair(SMALL, torch.device("cpu"), torch.float32)


def test_every_part_of_a_step_is_timed(pair, monkeypatch):
    monkeypatch.setattr(scout, "REPEATS", 1)
    monkeypatch.setattr(scout, "ROWS", (1, 4))
    with torch.inference_mode():
        found = list(scout.times(pair, [(1, 96), (1, 2**40)], 60))
    parts = {"attention, local", "attention, global", "norm, router, experts", "input norm", "head"}
    assert {t.what for t in found} == parts | {"step", "draft fc", "draft level"}
    assert all(t.ms and t.ms > 0 for t in found[:-1])
    assert found[-1].ms is None
    assert "more than is free" in found[-1].note
    with torch.inference_mode():
        late = list(scout.times(pair, [(1, 96)], -1))
    assert late[-1].note == "no time left"


def test_random_weights_give_finite_logits(pair):
    step = pair.target.allocate_cache(8).causal_step(5)
    logits = pair.target(torch.arange(5), step).logits_TV
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_simulated_speed_is_arithmetic_on_measured_times():
    def step(rows, ms):
        return scout.Timed("step", 2, 1024, rows, ms)

    drafts = [scout.Timed(f"draft {what}", 1, 1024, 1, 1.0) for what in ("fc", "level")]
    (slow, *_, fast) = scout.simulated([*drafts, step(1, 10.0), step(4, 16.0)])
    assert slow["simulated_tokens_per_second"] == pytest.approx(1e3 * 2 * 2.0 / (16 + 1 + 3))
    assert fast["x_plain"] == pytest.approx(3.0 * 10 / 20)


def test_the_model_of_random_weights_stays_in_results_and_is_labelled():
    times = [{"what": "step", "batch": 1, "context": 8192, "rows": 4, "ms": 8.25}]
    rates = [{"batch": 1, "simulated_length": 2.5}]
    run = {"model": "Scout's shape", "device": "H200", "times": times, "simulated": rates}
    new = {"ceilings": {}, "rows": [], "scout": run}
    saved = merged({}, new)
    assert merged(saved, {"ceilings": {}, "rows": []})["scout"] == run
    shown = scout_markdown([saved])
    assert "| 1 | 8192 | 4 | 8.25 |" in shown
    assert "Simulated: no draft was trained" in shown
    assert scout_markdown([{}]) == "A model of Scout's size has not been run yet."
