"""The bench kit without a GPU: its clock and its graphs are played by fakes.

Regimes: samples and their order; copies that share nothing and keep strides; graph capture, its
fallback, flushes; floors; providers that are wrong, broken or absent; tests that are red; rows,
tables, merging, the README's blocks; the picture; peers against our references; one real run.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.experts import experts_ref
from aerie.kernels.quantize import FP8
from aerie.kernels.router import Routing
from aerie.kernels.tree_attention import TreeRows, tree_attention_ref
from bench import ceilings, compare, copies, graphs, peers, report, roofline, tables, timer, verdict
from bench.repeats import run_that_differs
from bench.session import COMPILED_ONCE, INTERPRETED, BenchSession, case_of, in_cases
from bench.timer import Timer, Work
from tests.evidence import takes_row_scales

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
REACHED = ceilings.Ceilings(4000.0, 4400.0, 800.0, 1400.0, 1.5)


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


@dataclass(frozen=True)
class Noted:
    values: torch.Tensor
    memo: dict = field(default_factory=dict, init=False)


# samples


def test_samples_are_interleaved_in_changing_order():
    order: list[str] = []

    def named(name: str, samples: int) -> Timer:
        return Timer("", lambda: order.append(name) or 1.0, lambda: 1.0, samples)

    samples = timer.interleaved({name: named(name, 2) for name in "abcd"})
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abcd", 6)
    rounds = [tuple(order[i : i + 8 : 2]) for i in range(0, 24, 8)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) == 3


def test_summary_ignores_one_interruption():
    assert timer.summary([1.0, 2.0, 3.0, 4.0, 1000.0]) == {
        "median_us": 3.0,
        "p20_us": pytest.approx(1.8),
        "p80_us": pytest.approx(203.2),
    }


@pytest.mark.parametrize(
    ("call_us", "number", "expected"),
    [(100.0, 4, 20), (1e6, 4, 4), (0.0, 4, 256), (1.0, 32, 256), (40.0, 3, 51)],
)
def test_calls_are_whole_walks(call_us, number, expected):
    assert timer.calls_for(call_us, number, target_us=2000) == expected


def test_host_timer_walks_through_the_copies():
    seen: list[int] = []
    timed = timer.host_timer(seen.append, [(0,), (1,), (2,)], torch.ones(8))
    seen.clear()
    assert timed.sample() > 0
    assert seen[:6] == [0, 1, 2, 0, 1, 2]
    assert len(seen) % 3 == 0


# copies


def test_copies_share_nothing_and_keep_strides():
    view = torch.arange(12.0).view(3, 4)[:, 1:3]
    value = ([view], Pair(view, 3), Noted(view), "half", None)
    copy = copies.copied(value)
    assert [x.stride() for x in copies.tensors(copy)] == [(4, 1)] * 3
    assert len({x.data_ptr() for x in [*copies.tensors(copy), view]}) == 4
    assert all(torch.equal(x, view) for x in copies.tensors(copy))
    assert (copy[1].second, copy[3], copy[4]) == (3, "half", None)


def test_memos_are_not_copied():
    value = Noted(torch.ones(2))
    value.memo["seen"] = torch.ones(3)
    assert copies.copied(value).memo == {}
    assert copies.held_bytes(value) == 8


@pytest.mark.parametrize(
    ("touched", "held", "expected"),
    [(60, 60, 4), (61, 61, 4), (240, 240, 1), (59, 59, 5), (1, 1, 32), (1, 2**28, 1), (0, 0, 32)],
)
def test_number_of_copies(touched, held, expected):
    assert copies.copies_for(touched, held, cache_bytes=60, device=CPU) == expected


def test_cold_is_four_caches():
    assert copies.is_cold(60, 4, 60)
    assert not copies.is_cold(60, 3, 60)


# graphs


class FakeCuda:
    """A device whose clock moves by what runs on it; `flushed` counts fills before a call."""

    def __init__(self) -> None:
        self.now, self.capturing, self.mode, self.replays = 0.0, None, "default", 0

    def spend(self, microseconds: float) -> None:
        if self.capturing is None:
            self.now += microseconds
        else:
            self.capturing.append(microseconds)

    def synchronize(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def CUDAGraph(self):
        nodes: list[float] = []

        def replay() -> None:
            self.replays += 1
            self.now += sum(nodes)

        return SimpleNamespace(nodes=nodes, replay=replay)

    @contextmanager
    def graph(self, graph):
        self.capturing = graph.nodes
        yield
        self.capturing = None

    def Event(self, enable_timing: bool):
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda stop: (stop.at - event.at) / 1e3
        return event


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    return fake


class Flush:
    """Stands for the buffer whose filling empties the cache."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, []

    def zero_(self) -> None:
        self.at.append(self.cuda.now)


def test_graph_time_is_of_one_call_and_the_flush_is_outside(cuda):
    flush = Flush(cuda)
    timed = graphs.graph_timer(cuda.spend, [(4.0,), (6.0,)], flush)
    assert timed.how == "graph"
    assert timed.sample() == pytest.approx(5.0)
    before, replays = cuda.now, cuda.replays
    assert timed.single_shot() == pytest.approx(4.0)
    assert flush.at == [before]
    assert cuda.replays == replays + 1


def test_call_that_syncs_is_timed_between_events(cuda):
    def reads_the_device() -> None:
        cuda.synchronize()
        cuda.spend(7.0)

    timed = graphs.graph_timer(reads_the_device, [()], Flush(cuda))
    assert timed.how == "events (called a synchronizing CUDA operation)"
    assert (timed.sample(), timed.single_shot()) == (pytest.approx(7.0), pytest.approx(7.0))
    assert (cuda.replays, cuda.mode) == (0, "default")


def test_launches_counts_what_the_device_ran(cuda, monkeypatch):
    kinds = [SimpleNamespace(name=name) for name in ("CPU", "CUDA", "CUDA")]

    @contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kind) for kind in kinds])

    monkeypatch.setattr(graphs, "profile", profile)
    assert graphs.launches(lambda: None, ()) == 2


# ceilings


@pytest.mark.parametrize(
    ("work", "floor"),
    [
        (Work(bytes=4_000_000), 1.0),
        (Work(bytes=4_000_000, flops=1_600_000_000), 2.0),
        (Work(bytes=4_000_000, flops=2_800_000_000, fp8_products=True), 2.0),
    ],
)
def test_floor_is_the_larger_of_bytes_and_products(work, floor):
    assert REACHED.floor_us(work) == pytest.approx(floor)


def test_rates_against_both_floors():
    row = compare.rates(2.0, Work(bytes=4_400_000, flops=800), REACHED)
    assert row["gb_s"] == pytest.approx(2200)
    assert row["percent_of_floor"] == pytest.approx(55)
    assert row["percent_of_read"] == pytest.approx(50)


@pytest.mark.parametrize("elements", [1, 2048, 3 * 2048 + 5])
def test_read_reduction_reads_everything_once(elements, device):
    x = torch.randint(0, 8, (elements,), device=device).float()
    assert ceilings.read_sum(x, programs=2).sum() == x.sum()


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "BYTES", {"cpu": 2**16})
    monkeypatch.setattr(ceilings, "SIDE", {"cpu": 32})
    reached = ceilings.measure_ceilings(CPU).as_dict()
    assert reached.pop("fp8_tflop_s") is None
    assert min(reached.values()) > 0


# providers


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    monkeypatch.setattr(compare, "cache_bytes", lambda device: 4096)


def contenders(**ops) -> dict:
    x = torch.linspace(1, 2, 64)
    return {
        name: op if isinstance(op, str) else compare.Contender(op, (x,)) for name, op in ops.items()
    }


def broken(x):
    raise TypeError("their API changed\nsecond line")


def test_a_kernel_that_does_not_repeat_its_bits_gets_no_time():
    calls = []

    def sometimes_other(x):
        calls.append(1)
        return x + 1e-6 * (len(calls) == 7)

    def writes(x):
        x += 1

    x = torch.rand(5) + 1
    assert run_that_differs(sometimes_other, (x,), 20) == 5  # behind a call to see what it returns
    assert run_that_differs(torch.sqrt, (-x,), 3) is None  # NaNs too
    assert run_that_differs(writes, (x.clone(),), 3) is None
    calls.clear()
    ours = {"triton": compare.Contender(sometimes_other, (x,))}
    rows = compare.compare(ours, Work(bytes=40), REACHED, CPU)
    assert rows["triton"]["status"] == "refused: run 5 of 100 gave other bits than run 0"


def test_only_right_answers_get_a_time():
    nan = torch.tensor([float("nan")])
    ops = contenders(
        eager=lambda x: x * 2,
        triton=lambda x: x + x,
        wrong=lambda x: x * 2.1,
        poisoned=lambda x: torch.cat((x[1:] * 2, nan)),
        short=lambda x: x[1:] * 2,
        peer=broken,
        absent="skipped: no module",
    )
    rows = compare.compare(ops, Work(bytes=512), REACHED, CPU)
    assert rows["triton"]["status"] == rows["eager"]["status"] == "ok"
    assert rows["triton"]["median_us"] > 0
    assert rows["triton"]["samples"] == 15
    assert rows["wrong"]["status"] == "refused: differs from eager by 0.05"
    assert rows["poisoned"]["status"] == "refused: differs from eager by inf"
    assert rows["short"]["status"].startswith("refused: shapes [(63,)]")
    assert rows["peer"]["status"] == "skipped: TypeError: their API changed"
    assert rows["absent"]["status"] == "skipped: no module"


@pytest.mark.parametrize("ours", compare.OURS)
def test_our_own_failure_is_an_error(ours):
    with pytest.raises(TypeError, match="API"):
        compare.compare(contenders(**{ours: broken}), Work(bytes=1), REACHED, CPU)


def test_in_place_ops_are_judged_by_their_arguments():
    def doubled(x) -> None:
        x *= 2

    def untouched(x) -> None:
        pass

    rows = compare.compare(
        contenders(eager=doubled, triton=doubled, lazy=untouched), Work(bytes=1), REACHED, CPU
    )
    assert rows["triton"]["status"] == "ok"
    assert rows["lazy"]["status"] == "refused: differs from eager by 0.5"


def test_integers_count_only_alone():
    one, two = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert compare.disagreement([one], [two])
    assert not compare.disagreement([torch.ones(1), one], [torch.ones(1), two])


def test_rivals_of_the_reference(monkeypatch):
    monkeypatch.setattr(compare, "_compiled", lambda op: op)
    eager = contenders(eager=torch.relu, triton=torch.relu)
    everyone = compare.with_rivals("swiglu", eager)
    assert list(everyone)[:3] == ["eager", "triton", "compile"]
    for name, module in (("liger", "liger_kernel"), ("flashinfer", "flashinfer")):
        contender = everyone[name]
        if isinstance(contender, str):
            assert contender == f"skipped: No module named '{module}'"
    assert compare.with_rivals("swiglu", contenders(triton=torch.relu)).keys() == {"triton"}


# peers


def test_sdpa_peer_is_our_reference():
    """A tree of five behind a prefix in shuffled pages, whole and in chunks that start inside."""
    pages, page_size, prefix = 6, 4, 17
    k, v = torch.randn(2, pages, page_size, 2, 8)
    q = torch.randn(5, 6, 8)
    rows = TreeRows(
        prefix + torch.tensor([0, 1, 1, 2, 2]),
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([prefix], dtype=torch.int32),
        torch.randperm(pages).int()[None],
        torch.tensor([0b1, 0b11, 0b101, 0b1011, 0b10101]),
        5,
    )
    peer = peers.sdpa()
    for chunk in (None, 8, 18):
        expected = tree_attention_ref(q, k, v, rows, chunk, 0.3)
        actual = peer.op(*peer.prepare(q, k, v, rows, chunk, 0.3))
        torch.testing.assert_close(actual, expected)


def expert_arguments(dtype: torch.dtype) -> tuple:
    """Six rows of width 32 for three experts of width 16."""
    x, shared = torch.randn(2, 6, 32).to(dtype)
    weights = torch.randn(3, 32, 32).to(dtype) / 6, torch.randn(3, 32, 16).to(dtype) / 4
    ids = torch.tensor([2, 0, 2, 2, 0, 0], dtype=torch.int32)[:, None]
    return x, Routing(ids, torch.rand(6, 1).to(dtype)), *map(ExpertMatrix, weights), shared


@pytest.mark.parametrize("load", [peers.grouped_mm, peers.transformers_experts])
def test_expert_peers_are_our_reference(load):
    arguments, peer = expert_arguments(torch.bfloat16), load()
    actual = peer.op(*peer.prepare(*arguments))
    assert not compare.disagreement([actual], [experts_ref(*arguments)])
    quantized = ExpertMatrix(arguments[2].weight.to(FP8), torch.ones(3, 1, 1))
    with pytest.raises(ValueError, match="unquantised"):
        peer.prepare(*arguments[:2], quantized, *arguments[3:])


def test_scaled_mm_loop_is_our_reference():
    if not takes_row_scales("cpu"):
        pytest.skip(f"torch {torch.__version__} has no product with scales per row on a CPU")
    x, routing, gate_up, down, shared = expert_arguments(torch.bfloat16)
    weights = (matrix.weight for matrix in (gate_up, down))
    matrices = [ExpertMatrix((w * 64).to(FP8), torch.full((3, 32, 1), 1 / 64)) for w in weights]
    peer = peers.scaled_mm_loop()
    actual = peer.op(*peer.prepare(x, routing, *matrices, shared))
    # two roundings of the scaled rows that the reference does not have
    expected = experts_ref(x, routing, *matrices, shared)
    assert (actual - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ValueError, match="scale per channel"):
        peer.prepare(x, routing, gate_up, down, shared)


# verdicts


class Memory(dict):
    def set(self, key, value) -> None:
        self[key] = value


ENVIRONMENT = {"source": "a", "versions": "b", "device": "c", "commit": "d"}


def test_only_green_is_remembered_and_only_for_this_code(monkeypatch):
    asked: list[str] = []

    def run_tests(ops, device):
        asked.extend(ops)
        return "green" if "bad" not in ops else "FAILED test_bad"

    monkeypatch.setattr(verdict, "run_tests", run_tests)
    memory = Memory()
    expected = {"good": "green", "bad": "FAILED test_bad"}
    for _ in range(2):
        assert verdict.verdicts(["good", "bad", "good"], CPU, ENVIRONMENT, memory) == expected
    asked_before = asked.count("good")
    verdict.verdicts(["good"], CPU, ENVIRONMENT, memory)
    assert asked.count("good") == asked_before
    assert asked.count("bad") > 1
    verdict.verdicts(["good"], CPU, ENVIRONMENT | {"source": "edited"}, memory)
    assert asked.count("good") == asked_before + 1


def test_one_red_file_does_not_stain_its_group(monkeypatch):
    monkeypatch.setattr(verdict, "run_tests", lambda ops, _: "red" if "b" in ops else "green")
    assert verdict.judged(["a", "b", "c"], CPU) == {"a": "green", "b": "red", "c": "green"}


def test_red_and_missing_test_files(monkeypatch, tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_bad.py").write_text("def test_it():\n    assert 1 == 2\n")
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    assert verdict.run_tests(["bad"], CPU).startswith("FAILED tests/kernels/test_bad.py::test_it")
    assert verdict.run_tests(["gone"], CPU) == "no tests/kernels/test_gone.py"


@pytest.mark.parametrize(
    ("codes", "green"), [((0, 0), True), ((0, 5), True), ((0, 1), False), ((5,), False)]
)
def test_on_a_gpu_its_own_tests_run_too(monkeypatch, codes, green):
    """Code 5, nothing collected, is fine only where there may be nothing marked `gpu`."""
    asked, answers = [], iter(codes)

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=next(answers), stdout="")

    monkeypatch.setattr(verdict.subprocess, "run", run)
    assert (verdict.run_tests(["swiglu"], torch.device("cuda")) == "green") is green
    assert [command[-2:] == ["-m", "gpu"] for command in asked] == [False, True][: len(codes)]


def test_session_refuses_all_but_green():
    session = BenchSession(CPU, {}, {"good": "green", "bad": "FAILED"})
    assert session.refusal("good") is None
    assert session.refusal("bad") == "refused: FAILED"
    assert session.refusal("new") == "refused: no test was run"


def test_a_case_is_timed_once_all_providers_are_in(monkeypatch):
    monkeypatch.setattr(BenchSession, "ceilings", REACHED)
    session, infos = BenchSession(CPU, {"device": "here"}, {}), ({}, {})
    both = contenders(triton=torch.relu, eager=torch.relu)
    reasons = [session.enter(name, both[name], infos[i]) for i, name in enumerate(both)]
    assert reasons == [INTERPRETED, None]
    assert session.rows == []
    monkeypatch.setattr(compare, "_compiled", lambda op: op)
    session.finish(("relu", "rows=1"), Work(bytes=512), "float32[64]")
    status = {row["provider"]: row["status"].split(":")[0] for row in session.rows}
    assert status == {"triton": "skipped", "eager": "ok", "compile": "ok"}
    assert all(row["device"] == "here" and row["shapes"] for row in session.rows)
    assert infos[1]["median_us"] > 0
    assert session.waiting == {}
    session.enter("eager", both["eager"], {})
    session.finish(("relu", "rows=2"), Work(bytes=512), "float32[64]")
    again = {row["provider"]: row["status"] for row in session.rows[3:]}
    assert again == {"eager": "ok", "compile": COMPILED_ONCE}


# collection


def test_providers_of_a_case_become_neighbours(pytester_items):
    names = [item.name for item in in_cases(pytester_items)]
    assert names == ["bench_x[a-1]", "bench_x[b-1]", "bench_x[a-2]", "bench_x[b-2]"]
    assert case_of(pytester_items[0]) == ("x", "rows=1")


@pytest.fixture
def pytester_items(request):
    """Four items of a bench with the provider varying slowest, the order `in_cases` must mend."""

    def bench_x(provider, rows, measure):
        pass

    def item(provider: str, rows: int):
        node = pytest.Function.from_parent(
            request.node.parent, name=f"bench_x[{provider}-{rows}]", callobj=bench_x
        )
        node.originalname = "bench_x"
        params = {"provider": provider, "rows": rows}
        vars(node)["callspec"] = SimpleNamespace(params=params)
        return node

    return [item(provider, rows) for provider in "ab" for rows in (1, 2)]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "kernels").glob("*.py")), ids=lambda p: p.stem
)
def test_every_bench_compares_with_its_reference(path):
    module = vars(import_module(f"bench.kernels.{path.stem}"))
    functions = [function for name, function in module.items() if name.startswith("bench_")]
    benches = [f for f in functions if "measure" in signature(f).parameters]  # others only assert
    assert benches
    for bench in benches:
        marks = {mark.args[0]: mark.args[1] for mark in bench.pytestmark}
        assert {"triton", "eager"} <= set(marks["provider"])
    assert (ROOT / "tests" / "kernels" / f"test_{path.stem}.py").is_file()


# reports


def row(op="x", provider="triton", median=10.0, status="ok", cold=True, **more) -> dict:
    given = {"op": op, "case": "rows=1", "provider": provider, "status": status}
    if status == "ok":
        work = Work(bytes=20_000_000, flops=1_000_000)
        given |= {"median_us": median, "p20_us": median - 1, "p80_us": median + 1}
        given |= {"single_shot_us": 12.0, "launches": 1, "cold": cold, "timing": "graph"}
        given |= compare.rates(median, work, REACHED)
    where = {"device": "NVIDIA H200", "driver": "580", "versions": "torch 2", "commit": "abc"}
    return given | where | more


def saved(*rows: dict) -> dict:
    return {"ceilings": REACHED.as_dict(), "rows": list(rows)}


def test_table_shows_every_row():
    text = tables.table(
        saved(row(), row(provider="eager", median=25.0), row(op="y", status="refused: red"))
    )
    lines = text.splitlines()
    assert lines[0] == "NVIDIA H200, 580, torch 2, abc"
    assert lines[1].startswith("ceilings: copy_gb_s 4000")
    cells = " ".join(lines[3].split())
    assert cells == "x rows=1 triton 10 9-11 12 1 cold graph 2000 0.1 5 50 45.5 2.5"
    assert lines[5].split(maxsplit=3) == ["y", "rows=1", "triton", "refused: red"]


def test_a_warm_call_has_no_percent_of_the_floor():
    assert tables.percent(row(cold=False)) is None
    assert tables.percent(row()) == pytest.approx(50)


def test_table_of_the_generate_bench():
    text = tables.table(json.loads((ROOT / "bench/results/cpu-generate.json").read_text()))
    assert "bench_generate[chain of 4]" in text


def test_merge_updates_rows_in_place(tmp_path):
    report.merge(saved(row(median=30.0), row(op="a"), row(op="z")), tmp_path)
    skipped, refused = row(op="a", status="skipped: away"), row(op="z", status="refused: red")
    path = report.merge(saved(row(median=20.0), skipped, refused), tmp_path)
    assert path == tmp_path / "nvidia-h200.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(r["op"], r["status"], r.get("median_us")) for r in rows] == [
        ("a", "ok", 10.0),  # a skip says nothing new
        ("x", "ok", 20.0),
        ("z", "refused: red", None),  # a number of a kernel that is now wrong must go
    ]


def test_local_results_are_not_committed(tmp_path):
    for name in ("last.local.json", "device.json"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert report.committed_results(tmp_path) == [{"name": "device.json"}]


def test_readme_blocks_are_rewritten_between_their_markers():
    empty = "".join(
        f"top\n<!-- bench:{n} -->\nold\n<!-- /bench:{n} -->\nend\n" for n in report.BLOCKS
    )
    results = [saved(row(), row(provider="eager", median=25.0), row(op="y", status="refused: red"))]
    once = report.with_blocks(empty, results)
    assert "| `x` | rows=1 | 10 | 9-11 | 50 | 2.5 | - |" in once
    assert "y, rows=1: refused: red." in once
    assert "old" not in once
    assert once.count("top\n") == once.count("end\n") == len(report.BLOCKS)
    assert report.with_blocks(once, results) == once
    assert "No kernel has been timed on a GPU yet." in report.with_blocks(empty, [])
    with pytest.raises(ValueError, match="bench:kernels"):
        report.with_blocks("no markers", results)


def test_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text()
    assert report.with_blocks(readme, report.committed_results()) == readme, (
        "stale or typed by hand: run `python -m bench.report --readme`"
    )


def test_report_prints_and_merges(tmp_path, capsys, monkeypatch):
    file = tmp_path / "new.json"
    file.write_text(json.dumps(saved(row())))
    report.main([str(file)])
    assert "NVIDIA H200" in capsys.readouterr().out
    report.main([str(file), "--markdown"])
    assert "| `x` |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main(["--png", "picture.png"])


# the picture


class FakeAxes:
    """Takes every call of a plot and remembers the points."""

    def __init__(self) -> None:
        self.points: list[tuple] = []

    def scatter(self, x, y, **_) -> None:
        self.points += zip(x, y, strict=True)

    def __getattr__(self, name):
        return lambda *args, **named: None


def test_roofline_places_our_rows(monkeypatch, tmp_path):
    axes, written = (FakeAxes(), FakeAxes()), []
    figure = SimpleNamespace(
        subplots=lambda *_: axes,
        suptitle=lambda *_: None,
        savefig=lambda path, dpi: written.append(path),
    )
    module = SimpleNamespace(Figure=lambda **_: figure)
    monkeypatch.setattr(roofline, "import_module", lambda name: module)
    rows = [row(), row(provider="sdpa"), row(op="y", flops=0), row(op="z", status="refused: red")]
    roofline.draw(saved(*rows), tmp_path / "p.png")
    assert axes[0].points == [(pytest.approx(0.05), pytest.approx(0.1))]
    assert len(axes[1].points) == 2
    assert written == [tmp_path / "p.png"]
    with pytest.raises(SystemExit, match="no row"):
        roofline.draw(saved(row(status="skipped: x")), tmp_path / "p.png")


def test_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"aerie\[bench\]"):
        roofline.draw(saved(row()), tmp_path / "p.png")


def test_picture_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    roofline.draw(saved(row(), row(provider="eager", median=25.0)), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


# one real run


def test_a_bench_runs_and_saves_rows(tmp_path):
    """In a process of its own, the interpreter off: as `make bench` does it, for one small case."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench/kernels/rotation.py", "-k", "1]"]
    options = [f"--benchmark-json={file}", "--commit=given"]
    inherited = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")  # a worker would measure nothing
    plain = {name: value for name, value in os.environ.items() if name not in inherited}
    plain["TORCHDYNAMO_DISABLE"] = "1"  # starting the compiler costs more than all the rest
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=plain, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    result = json.loads(file.read_text())
    rows = {r["provider"]: r for r in result["rows"]}
    assert set(rows) == {"triton", "eager", "compile"}
    assert rows["eager"]["status"] == "ok"
    assert rows["eager"]["commit"] == "given"
    assert rows["eager"]["shapes"] == "int64[1] float32[64]"
    assert result["benchmarks"][0]["extra_info"]["median_us"] == rows["eager"]["median_us"]
    assert result["ceilings"]["copy_gb_s"] > 0
