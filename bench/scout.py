"""Scout's 48 layers with random FP8 weights on one GPU: rounds, their parts, simulated speed.

    python -m bench.scout [--small] [--seconds N] [--json FILE]

A step is one pass of the target over T rows of each of B sequences behind a context; a draft level
is one recycled pass of the draft over a row of each. Each is timed as a captured graph (on a CPU by
the host's clock). Combinations that the memory cannot hold are named, not measured.

Tokens per second are simulated: there is no trained draft, the acceptance length is imposed, and
only the times are measured. A round with k drafts is a step of k + 1 rows and k draft levels.

`--small` is a model of the same kinds of layers for a CPU: it exercises this file, no more.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter

import torch
from torch import Tensor

from aerie.kernels.rms_norm import NormedResidual
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.decoder import DecoderLayer
from aerie.llama4.moe import MoE
from aerie.llama4.step import Step
from bench.environment import describe
from bench.graphs import captured, elapsed_us
from bench.random_model import SCOUT, SMALL, Pair, random_pair
from bench.tables import aligned

ROWS, BATCHES, CONTEXTS = (1, 4, 8, 16), (1, 8, 32), (1024, 8192, 32768, 131072)
SMALL_CONTEXTS, SMALL_BATCHES = (96, 192), (1, 2)
ACCEPTED = {4: (2.0, 2.5, 3.0), 8: (2.5, 3.5, 4.5), 16: (3.0, 4.0, 5.0)}  # lengths, by rows
REPEATS, SPARE_BYTES = 5, 2**31


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one call; `note` says why there are none."""

    what: str
    batch: int
    context: int
    rows: int
    ms: float | None
    note: str = ""


def timed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls: of the device inside a graph, or of the host on a CPU."""
    call()  # compiles
    if device.type == "cuda":
        replay = captured(call)
        replay()
        return median(elapsed_us(replay) for _ in range(REPEATS)) / 1e3
    return 1e3 * median(_host_seconds(call) for _ in range(REPEATS))


def _host_seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def filled_cache(pair: Pair, batch: int, context: int) -> PagedKVCache:
    """A cache of `batch` sequences of `context` random tokens each."""
    cache = pair.target.allocate_cache(context + max(ROWS), batch, max_step_rows=max(ROWS))
    for pool in cache.pools:
        for part in (pool.k_LRCGK, pool.v_LRCGK):
            part.normal_()
    cache.lengths = [context] * batch
    return cache


def kv_bytes(pair: Pair, batch: int, context: int) -> int:
    """What `filled_cache` would take at most: as if no layer were chunked."""
    config, size = pair.target.config, pair.target.dtype.itemsize
    chunk = config.attention_chunk_size or context
    kept = [
        min(context, chunk + 64) if is_chunked else context for is_chunked in config.chunked_layers
    ]
    tokens = sum(kept) + len(kept) * (max(ROWS) + 64)
    return 2 * batch * tokens * config.num_key_value_heads * config.head_dim * size


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**34


def step_of(cache: PagedKVCache, rows: int) -> Step:
    return cache.causal_step(*[rows] * len(cache.lengths))


def times(pair: Pair, shapes: list[tuple[int, int]], seconds: float) -> Iterator[Timed]:
    """Steps and parts at every (batch, context) of `shapes`, as long as the time lasts."""
    device, end = pair.target.lm_head.weight.device, monotonic() + seconds
    yield from draft_times(pair, device)
    for batch, context in shapes:
        needed = kv_bytes(pair, batch, context) + SPARE_BYTES
        note = "no time left" * (monotonic() > end)
        if needed > free_bytes(device):
            note = f"keys and values need {needed / 2**30:.0f} GiB more than is free"
        if note:
            yield Timed("step", batch, context, 0, None, note)
            continue
        cache = filled_cache(pair, batch, context)
        for rows in ROWS:
            step, ids = step_of(cache, rows), torch.zeros(batch * rows, dtype=torch.int64)
            ids = torch.randint_like(ids, pair.target.config.vocab_size).to(device)
            ms = timed_ms(lambda ids=ids, step=step: pair.target(ids, step), device)
            yield Timed("step", batch, context, rows, ms)
            if batch == shapes[0][0]:
                yield from part_times(pair, step, batch, context, rows)


def part_times(pair: Pair, step: Step, batch: int, context: int, rows: int) -> Iterator[Timed]:
    """Every kind of part on its own, times how often it occurs in a step."""
    target = pair.target
    config = target.config
    layers = [layer for layer in target.model.layers if isinstance(layer, DecoderLayer)]
    x = torch.randn(batch * rows, config.hidden_size).to(target.lm_head.weight)
    turns = target.model.rotation(step.rows.positions_T)
    local, full = config.chunked_layers.index(True), config.chunked_layers.index(False)
    moe = layers[config.moe_layers[0]]
    experts = moe.feed_forward
    assert isinstance(experts, MoE)

    def feed_forward() -> Tensor:
        return experts(experts.enter(x, x, moe.post_attention_layernorm))

    def norm() -> NormedResidual:
        return moe.input_layernorm.add(x, x)

    count = config.num_hidden_layers
    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "attention, local": (
            sum(config.chunked_layers),
            lambda: layers[local].self_attn(x, turns, step),
        ),
        "attention, global": (
            count - sum(config.chunked_layers),
            lambda: layers[full].self_attn(x, turns, step),
        ),
        "norm, router, experts": (count, feed_forward),
        "input norm": (count, norm),
        "head": (1, lambda: target.lm_head(x)),
    }
    for name, (times_, call) in parts.items():
        yield Timed(name, batch, context, rows, times_ * timed_ms(call, x.device))


def draft_times(pair: Pair, device: torch.device) -> Iterator[Timed]:
    """fc over the taps, and a recycled level with its token, behind 1024 tokens (or fewer)."""
    draft, context = pair.draft, min(1024, pair.target.config.max_position_embeddings // 2)
    cache = draft.allocate_cache(context + 64)
    cache.lengths = [context]
    step = cache.causal_step(1)
    hidden = torch.randn(1, draft.config.hidden_size).to(draft.lm_head.weight)
    taps = [hidden] * len(draft.tap_layers(pair.target))
    ids = torch.zeros(1, dtype=torch.int64, device=device)

    def level() -> object:
        return draft.top_tokens(draft(ids, hidden, step).post_norm_TD, 1)

    fused = timed_ms(lambda: draft.combine_hidden_states(taps), device)
    yield Timed("draft fc", 1, context, 1, fused)
    yield Timed("draft level", 1, context, 1, timed_ms(level, device))


def simulated(found: list[Timed]) -> list[dict]:
    """Tokens per second if rounds accepted a given length; the times are those measured."""
    step_ms = {(t.batch, t.context, t.rows): t.ms for t in found if t.what == "step" and t.ms}
    draft = {t.what: t.ms or 0.0 for t in found if t.what.startswith("draft")}
    rates = []
    for (batch, context, rows), ms in step_ms.items():
        plain_ms = step_ms[batch, context, 1]
        round_ms = ms + draft["draft fc"] + (rows - 1) * draft["draft level"]
        for length in ACCEPTED.get(rows, ()):
            rates.append(
                {
                    "batch": batch,
                    "context": context,
                    "rows": rows,
                    "simulated_length": length,
                    "simulated_tokens_per_second": 1e3 * batch * length / round_ms,
                    "x_plain": length * plain_ms / round_ms,
                }
            )
    return rates


def transformers_layer_ms(values: dict, device: torch.device, dtype: torch.dtype) -> float:
    """One row through one of transformers' decoder layers (unquantised), without a cache."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4 import modeling_llama4 as theirs

    config = Llama4TextConfig(**{k: v for k, v in values.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer = theirs.Llama4TextDecoderLayer(config, 0).to(dtype).eval()
        turns = theirs.Llama4TextRotaryEmbedding(config)
        x = torch.randn(1, 1, config.hidden_size, dtype=dtype)
        positions = torch.zeros(1, 1, dtype=torch.int64)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.02)
    angles = turns(x, positions)
    return timed_ms(lambda: layer(x, position_embeddings=angles, attention_mask=None), device)


def measured(small: bool, seconds: float, device: torch.device) -> dict:
    """Everything as one object: what was timed, what follows, where."""
    values, contexts, batches = (
        (SMALL, SMALL_CONTEXTS, SMALL_BATCHES) if small else (SCOUT, CONTEXTS, BATCHES)
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(batch, context) for batch in batches for context in contexts]
    with torch.inference_mode():
        layer_ms = transformers_layer_ms(values, device, dtype)
        found = list(times(random_pair(values, device, dtype), shapes, seconds))
    theirs = {
        "what": "transformers, one layer times the layers, unquantised, without head and context",
        "layer_ms": layer_ms,
        "scaled_ms": layer_ms * values["num_hidden_layers"],
    }
    return {
        "model": "scaled down" if small else "Scout's shape, random FP8 weights",
        **describe(device),
        "times": [asdict(one) for one in found],
        "simulated": simulated(found),
        "transformers": theirs,
    }


def table(result: dict) -> str:
    columns = ("part", "batch", "context", "rows", "ms")
    body = [
        (t["what"], *(str(t[n]) for n in columns[1:4]), f"{t['ms']:.3f}" if t["ms"] else t["note"])
        for t in result["times"]
    ]
    lines = [f"{result['model']}, {result['device']}", aligned(columns, body)]
    theirs = result["transformers"]
    lines += [f"{theirs['what']}: {theirs['scaled_ms']:.3f} ms", "", "simulated acceptance:"]
    rates = [tuple(f"{v:.4g}" for v in row.values()) for row in result["simulated"]]
    return "\n".join([*lines, aligned(tuple(result["simulated"][0]), rates)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scout", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="then no further context")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("without a GPU only --small fits")
    torch.manual_seed(0)
    result = measured(options.small, options.seconds, device)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
