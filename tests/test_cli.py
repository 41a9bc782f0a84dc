"""The command line on the embedded pair: outputs, exit codes, and bad input."""

import io
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aerie import batch_run, report
from aerie.cli import app
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.graphs import GRAPH, PROCESSORS
from aerie.eagle3.stats import Stats
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.progress import decoding, reading_prompt
from aerie.run import Outcome
from aerie.text import TextStream

STATS = {
    "num_tokens",
    "num_target_passes",
    "num_drafts",
    "acceptance_length",
    "acceptance_per_position",
    "conditional_acceptance_per_position",
    "tokens_per_second",
    "draft_ms",
    "verify_ms",
    "other_ms",
}


def aerie(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def generate(*arguments: str):
    return aerie("generate", "--max-new-tokens", "12", "--device", "cpu", *arguments)


def test_json_is_one_object_on_stdout():
    result = generate("--prompt", "The with statement", "--check", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["identical"] is True
    assert len(printed["token_ids"]) == printed["stats"]["num_tokens"] == 12
    assert set(printed["stats"]) >= STATS
    assert printed["stats"]["num_drafts"] > 0


def test_fp8_cache():
    result = generate("--prompt", "A class", "--kv-cache-dtype", "fp8", "--check", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["identical"] is True
    assert generate("--prompt", "A class", "--kv-cache-dtype", "int8").exit_code == 2


@pytest.mark.parametrize("options", [("fp8",), ("fp8_block",), ("fp8", "--quantize-linears")])
def test_quantises_while_loading(options):
    shown = generate("--prompt", "A class", "--quantize", *options, "--check", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["identical"] is True


def test_quantised_linears_need_a_format():
    refused = generate("--prompt", "A class", "--quantize-linears")
    assert refused.exit_code == 2
    assert "--quantize-linears: needs --quantize" in refused.stderr
    assert generate("--prompt", "A class", "--quantize", "int8").exit_code == 2


def test_text_streams_before_the_table():
    as_json = json.loads(generate("--prompt", "A class", "--json").stdout)
    shown = generate("--prompt", "A class", "--check")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(as_json["text"])
    assert "acceptance length" in shown.stdout.removeprefix(as_json["text"])
    assert "same ids as without draft" in shown.stdout


def test_json_without_check_does_not_claim_identity():
    assert "identical" not in json.loads(generate("--prompt", "A class", "--json").stdout)


def test_plain_and_speculative_ids_agree():
    plain = json.loads(generate("--prompt", "A class", "--no-draft", "--json").stdout)
    config = '{"method": "eagle3", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 1}'
    other = generate("--prompt", "A class", "--speculative-config", config, "--json")
    assert json.loads(other.stdout)["token_ids"] == plain["token_ids"]
    assert plain["stats"]["num_drafts"] == 0


def test_draft_from_the_speculative_config():
    config = json.dumps({"method": "eagle3", "model": str(DRAFT)})
    arguments = ("--model", str(TARGET), "--speculative-config", config)
    result = generate(*arguments, "--prompt", "A class", "--json")
    assert json.loads(result.stdout)["stats"]["num_drafts"] > 0


def test_sampled_ids_agree_and_repeat():
    flags = ("--temperature", "0.9", "--top-p", "0.95", "--top-k", "40", "--min-p", "0.01")
    penalties = ("--repetition-penalty", "1.1", "--presence-penalty", "0.2", "--bad-word", "the")
    sampled = ("--prompt", "A class", *flags, *penalties, "--json")
    first = json.loads(generate(*sampled, "--check").stdout)
    assert first["identical"] is True
    again = json.loads(generate(*sampled, "--seed", str(first["seed"]), "--no-draft").stdout)
    assert again["token_ids"] == first["token_ids"]
    assert "seed" not in json.loads(generate("--prompt", "A class", "--json").stdout)
    forced = generate("--prompt", "A", "--logit-bias", '{"17": 100}', "--min-tokens", "5", "--json")
    assert set(json.loads(forced.stdout)["token_ids"]) == {17}


def test_stop_string_ends_text_and_stream():
    whole = json.loads(generate("--prompt", "A class", "--json").stdout)["text"]
    stop = whole[7:12]
    as_json = generate(
        "--prompt", "A class", "--stop", "never", "--stop", stop, "--check", "--json"
    )
    printed = json.loads(as_json.stdout)
    assert printed["finish_reason"] == "stop"
    assert printed["text"] == whole[: whole.find(stop)]
    shown = generate("--prompt", "A class", "--stop", stop)
    assert shown.stdout.startswith(printed["text"] + "\n")


def test_stream_holds_back_what_may_become_a_stop_string():
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    stream = TextStream(Letters(), ["abc", "zz"])  # as a tokenizer of one letter per token
    shown = [stream.add([ord(letter)]) for letter in "xabyzab"]
    assert shown == ["x", "", "", "aby", "", "z", ""]
    assert stream.flush() == "ab"
    assert stream.add([ord("c")]) == ""
    assert stream.text == "xabyz"


def test_prompt_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("The with statement")
    from_file = json.loads(generate("--prompt-file", str(file), "--json").stdout)
    from_text = json.loads(generate("--prompt", "The with statement", "--json").stdout)
    assert from_file["token_ids"] == from_text["token_ids"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_peak_memory():
    """A fresh process, as a user starts it. Not ru_maxrss: a new process inherits its parent's."""
    code = (
        "import sys; from pathlib import Path; from aerie.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(x.split()[1] for x in lines if x.startswith('VmHWM')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "generate", "--prompt", "The with statement", "--json"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stderr.split()[-1]) <= 700 * 1024  # KiB


def test_doctor():
    result = aerie("doctor", "--json")
    diagnosis = json.loads(result.stdout)
    assert result.exit_code == 0
    assert diagnosis["torch"] == torch.__version__
    expected = "triton (a GPU" if torch.cuda.is_available() else "eager (no GPU"
    assert diagnosis["backend auto"].startswith(expected)
    assert "backend auto" in aerie("doctor").stdout


def test_statistics():
    result = generate("--prompt", "A class", "--count-experts", "--json")
    printed = json.loads(result.stdout)
    stats, rounds = printed["stats"], printed["stats"]["rounds"]
    assert {len(values) for values in rounds.values()} == {stats["num_drafts"]}
    assert sum(rounds["num_accepted"]) == stats["num_accepted_tokens"]
    assert sum(rounds["verify_ms"]) == pytest.approx(stats["verify_ms"], abs=0.01)
    assert stats["acceptance_histogram"] == [
        rounds["num_accepted"].count(n) for n in range(len(stats["acceptance_histogram"]))
    ]
    assert list(printed["distinct_experts_per_layer"]) == ["5"]  # no pass of the prompt
    assert 1 < printed["distinct_experts_per_layer"]["5"] <= 5
    shown = generate("--prompt", "A class", "--count-experts").stdout
    for row in ("drafted, accepted", "drafts by accepted tokens", "ms of the median round"):
        assert row in shown
    assert "distinct experts of a layer" in shown
    assert "distinct_experts_per_layer" not in generate("--prompt", "A", "--json").stdout


def test_statistics_say_which_rounds_were_replayed():
    stats = Stats()
    assert "cuda_graphs" not in report.stats_as_dict(stats)
    stats.launches.update({GRAPH: 7, PROCESSORS: 2})
    told = report.stats_as_dict(stats)["cuda_graphs"]
    assert told == {"num_replayed": 7, "num_eager": {PROCESSORS: 2}}
    table = report.as_table(Outcome("", [], "length", stats, None, None))
    shown = io.StringIO()
    Console(file=shown, width=200).print(table)
    assert f"7; 2 not: {PROCESSORS}" in shown.getvalue()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra aerie[plot]")
def test_plot(tmp_path):
    picture = tmp_path / "out.png"
    assert generate("--prompt", "A class", "--plot", str(picture)).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra aerie[plot]")
def test_plot_of_a_batch(tmp_path):
    (tmp_path / "prompts").write_text("The with statement\nA class\ndef f(x):")
    picture = tmp_path / "out.svg"
    asked = ("--prompt-file", str(tmp_path / "prompts"), "--lines", "--plot", str(picture))
    assert generate(*asked, "--json").exit_code == 0
    assert "<svg" in picture.read_text()


class Axes:
    """Takes what a picture draws, whatever it is."""

    def __init__(self) -> None:
        self.bars, self.steps, self.set_to = [], [], {}

    def bar(self, _, heights, label="", **options):
        self.bars.append((label, heights))

    def step(self, _, heights, where):
        self.steps.append(heights)

    def set(self, **values):
        self.set_to |= values

    def __getattr__(self, name):
        return lambda *given, **named: None


def test_what_the_picture_of_a_batch_shows(tmp_path, monkeypatch):
    """Acceptance of all sequences together, every round's time once, and how many ran in it."""
    axes = [Axes(), Axes(), Axes()]
    figure = SimpleNamespace(subplots=lambda *_: axes, savefig=lambda *given, **named: None)
    made = SimpleNamespace(Figure=lambda **options: figure)
    monkeypatch.setattr("aerie.plotting.import_module", lambda name: made)
    monkeypatch.setattr("aerie.plotting.check", lambda path: None)
    seen = []
    run = batch_run.run_batch
    monkeypatch.setattr(
        "aerie.commands.generate.run_batch",
        lambda *given: seen.append(run(*given)) or seen[-1],
    )
    (tmp_path / "prompts").write_text("The with statement\nA class\ndef f(x):")
    asked = ("--prompt-file", str(tmp_path / "prompts"), "--lines", "--max-batch-size", "2")
    result = generate(*asked, "--plot", str(tmp_path / "out.png"), "--json")
    assert result.exit_code == 0, result.stderr
    (batch,), printed = seen, json.loads(result.stdout)
    accepted, drafts = (sum(one["stats"][name] for one in printed)
                        for name in ("num_accepted_tokens", "num_drafts"))  # fmt: skip
    ((_, shares),) = axes[0].bars
    assert sum(shares) == pytest.approx(accepted / drafts)
    assert [label for label, _ in axes[1].bars] == ["prefill", "draft", "verify", "other"]
    total = sum(sum(heights) for _, heights in axes[1].bars)
    assert total == pytest.approx(sum(one.prefill_ms + one.draft_ms + one.verify_ms + one.other_ms
                                      for one in batch.rounds))  # fmt: skip
    assert axes[2].steps == [[one.num_running for one in batch.rounds]]
    assert max(axes[2].steps[0]) == 2
    in_rounds = sum(len(one["stats"]["rounds"]["num_drafted"]) for one in printed)
    assert sum(axes[2].steps[0]) == in_rounds


def shown_by(bar, total: int, news: tuple[int, ...]) -> dict[bool, str]:
    """What a progress bar that is told `news` writes, on a terminal and off one."""
    written = {}
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80)
        with bar(total, console) as told:
            assert (told is None) != is_terminal
            if told is not None:
                told(*news)
        written[is_terminal] = file.getvalue()
    return written


def test_a_batch_shows_how_far_it_is_on_a_terminal_only(tmp_path):
    written = shown_by(decoding, 7, (2, 31))
    assert "2/7" in written[True]
    assert "31 tokens" in written[True]
    assert written[False] == ""
    (tmp_path / "prompts").write_text("A class\nimport os")
    result = generate("--prompt-file", str(tmp_path / "prompts"), "--lines", "--json")
    assert result.stderr.startswith("memory: ")
    assert len(result.stderr.splitlines()) == 1


def test_plot_that_cannot_be_drawn_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("aerie.plotting.find_spec", lambda _: None)
    for path, message in (
        (tmp_path / "out.png", "needs matplotlib; pip install 'aerie[plot]'"),
        (tmp_path / "out.txt", "must end in one of .png, .svg, .pdf"),
        (tmp_path / "absent" / "out.png", "is no folder"),
    ):
        result = generate("--prompt", "A class", "--plot", str(path))
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
        assert result.stdout == ""


def test_a_long_prompt_shows_how_far_it_is_read(monkeypatch):
    """In passes of 64 tokens; on a terminal only, and gone before the text comes."""
    monkeypatch.setattr("aerie.eagle3.engine.PREFILL_ROWS", 64)
    monkeypatch.setattr("aerie.progress.PREFILL_ROWS", 64)
    written = shown_by(reading_prompt, 200, (128,))
    assert "128/200" in written[True]
    assert written[False] == ""
    seen = []
    decoding = Decoding(Llama4ForCausalLM.from_pretrained(TARGET), [5] * 150, 2)
    decoding.decoded.on_prefill = seen.append
    list(decoding)
    assert seen == [64, 128, 150]


BAD = {
    "no prompt": ((), "exactly one"),
    "two prompts": (("--prompt", "a", "--prompt-file", "b"), "exactly one"),
    "empty prompt": (("--prompt", ""), "prompt is empty"),
    "absent prompt file": (("--prompt-file", "/absent"), "cannot read /absent"),
    "prompt too long": (("--prompt", "word " * 3000), "the context is 1024"),
    "no new tokens": (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens: must be"),
    "missing folder": (("--prompt", "a", "--model", "/absent"), "/absent: no such folder"),
    "k of 0": (
        ("--prompt", "a", "--speculative-config", '{"num_speculative_tokens": 0}'),
        "num_speculative_tokens: must be an integer",
    ),
    "k as text": (
        ("--prompt", "a", "--speculative-config", '{"num_speculative_tokens": "3"}'),
        "num_speculative_tokens: must be an integer",
    ),
    "unknown key": (
        ("--prompt", "a", "--speculative-config", '{"tree": 1}'),
        "unknown keys ['tree']",
    ),
    "unknown method": (
        ("--prompt", "a", "--speculative-config", '{"method": "medusa"}'),
        "supported is 'eagle3', got 'medusa'",
    ),
    "tensor parallel": (
        ("--prompt", "a", "--speculative-config", '{"tensor_parallel_size": 1}'),
        "draft_tensor_parallel_size",
    ),
    "draft parallel": (
        ("--prompt", "a", "--speculative-config", '{"draft_tensor_parallel_size": 2}'),
        "draft_tensor_parallel_size: must be 1",
    ),
    "unknown convention": (
        ("--prompt", "a", "--speculative-config", '{"tap_convention": "inputs"}'),
        "tap_convention: must be one of output_of, input_to, got 'inputs'",
    ),
    "temperature": (("--prompt", "a", "--temperature", "-1"), "temperature: must be in [0, inf]"),
    "top-p": (("--prompt", "a", "--top-p", "0"), "top_p: must be in (0, 1]"),
    "empty stop": (("--prompt", "a", "--stop", ""), "stop: must be non-empty strings"),
    "stop token": (("--prompt", "a", "--stop-token-id", "1024"), "ids must lie in 0..1023"),
    "empty bad word": (("--prompt", "a", "--bad-word", ""), "--bad-word: must be a text"),
    "bias": (("--prompt", "a", "--logit-bias", "[1]"), "--logit-bias: must be JSON"),
    "not json": (("--prompt", "a", "--speculative-config", "{"), "not valid JSON"),
    "contradiction": (("--prompt", "a", "--no-draft", "--draft", "x"), "contradicts"),
    "no such device": (("--prompt", "a", "--device", "tpu9"), "--device"),
    "no such backend": (("--prompt", "a", "--backend", "cuda"), "--backend"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case):
    arguments, message = BAD[case]
    result = generate(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.fixture
def broken(tmp_path):
    """`broken(change)`: a copy of the embedded target whose tensors `change` has edited."""

    def make(change):
        folder = shutil.copytree(TARGET, tmp_path / "target")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return str(folder)

    return make


def test_a_wrong_checkpoint_lists_everything(broken):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
        tensors["model.layers.3.self_attn.q_proj.weight"][0, 0] = torch.nan

    result = generate("--prompt", "a", "--model", broken(change))
    assert result.exit_code == 2
    for problem in (
        "4 tensors are wrong",
        "model.norm.weight: missing",
        "model.extra: unexpected",
        "lm_head.weight: shape (5, 128), expected (1024, 128)",
        "model.layers.3.self_attn.q_proj.weight: not finite",
    ):
        assert problem in result.stderr
    assert result.stdout == ""


def test_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    shutil.copy(TARGET / "tokenizer.json", tmp_path)
    result = generate("--prompt", "a", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "is not a Llama 4" in result.stderr


def test_check_is_refused_where_ids_may_differ():
    config = ("--speculative-config", '{"verification": "rejection"}', "--check", "--json")
    refused = generate("--prompt", "A class", "--temperature", "1", *config)
    assert refused.exit_code == 2
    assert "--check: compares ids, of which verification by rejection" in refused.stderr
    assert json.loads(generate("--prompt", "A class", *config).stdout)["identical"] is True


def test_check_exits_1_when_ids_differ(monkeypatch):
    """The comparison itself: a plain run that is made to differ must be reported."""
    from aerie import run

    def tampered(*arguments, **named):
        result = plain(*arguments, **named)
        result.tokens[3] += 1
        return result

    plain = run.generate
    monkeypatch.setattr(run, "generate", tampered)
    result = generate("--prompt", "A class", "--check", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["identical"] is False
    assert "differ from plain decoding at token 3" in result.stderr


def test_a_dead_draft_is_said_once_on_stderr(tmp_path):
    """In a process of its own, as a user sees it; stdout stays one JSON object."""
    folder = shutil.copytree(DRAFT, tmp_path / "draft")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    arguments = ("generate", "--model", str(TARGET), "--prompt", "A class", "--json")
    command = [sys.executable, "-m", "aerie", *arguments, "--max-new-tokens", "60"]
    dead = subprocess.run(
        [*command, "--draft", str(folder)], check=True, capture_output=True, text=True
    )
    assert json.loads(dead.stdout)["stats"]["acceptance_length"] < 1.2
    assert dead.stderr.count("the draft looks dead") == 1
    assert "aerie probe" in dead.stderr


def test_a_living_draft_is_not_called_dead(caplog):
    generate("--prompt", "The with statement", "--max-new-tokens", "120", "--json")
    assert "looks dead" not in caplog.text


@pytest.mark.parametrize("kind", ["lines", "JSON"])
def test_prompts_side_by_side(kind, tmp_path):
    """Results in order, each what the prompt alone gives."""
    file, texts = tmp_path / "prompts", ["The with statement", "A class", "def f(x):"]
    file.write_text("\n".join(texts) if kind == "lines" else json.dumps(texts))
    options = ["--max-new-tokens", "12", "--temperature", "0.9", "--seed", "5", "--json"]
    lines = ["--lines"] if kind == "lines" else []
    result = generate("--prompt-file", str(file), "--max-batch-size", "2", *lines, *options)
    together = json.loads(result.stdout)
    for number, (text, found) in enumerate(zip(texts, together, strict=True)):
        own = [*options[:-2], str(5 + number), "--json"]
        alone = json.loads(generate("--prompt", text, *own).stdout)
        assert found["token_ids"] == alone["token_ids"]
        assert found["seed"] == alone["seed"] == 5 + number
