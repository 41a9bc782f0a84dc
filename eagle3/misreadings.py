"""The known ways to misread a draft, one at a time, as readings that would correct them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.reading import Reading
from aerie.llama4.model import Llama4ForCausalLM


@dataclass(frozen=True)
class Candidate:
    """A known mistake and the reading that corrects it."""

    mistake: str
    reading: Reading


def candidates(draft: Eagle3Llama4ForCausalLM, target: Llama4ForCausalLM) -> Iterator[Candidate]:
    """One known mistake at a time."""
    config, base = draft.config, draft.config.reading
    for shift, late in ((-1, "late"), (1, "early")):
        taps = draft.tap_layers(target)
        shifted = _shifted(config, taps, shift, target.config.num_hidden_layers)
        if shifted is not None:
            yield Candidate(f"taps read one layer {late}", shifted)
    layout = config.attention.rotary_layout
    if layout is not None:
        other = "half" if layout == "interleaved" else "interleaved"
        yield Candidate(f"RoPE pairs read as {layout}", replace(base, rotary_layout=other))
    if layout is not None and (config.rope.scaling or config.rope.yarn):
        yield Candidate("RoPE scaled as the file says", replace(base, rope_scaling="none"))
    before, output = config.norm_before_residual, config.norm_output
    shown = f"norm_before_residual read as {str(before).lower()}"
    yield Candidate(shown, replace(base, norm_before_residual=not before))
    shown = f"norm_output read as {str(output).lower()}"
    yield Candidate(shown, replace(base, norm_output=not output))
    order = base.input_order or "embedding_first"
    other = "embedding_first" if order == "hidden_first" else "hidden_first"
    yield Candidate(f"attention input read as {order}", replace(base, input_order=other))
    if config.draft_vocab_size < config.vocab_size and draft.d2t.any():
        yield Candidate("d2t read as a map", replace(base, vocabulary_map="identity"))


def other_maps(base: Reading) -> Iterator[Candidate]:
    """What else a map that is refused may be."""
    yield Candidate("d2t holds target ids", replace(base, vocabulary_map="target_ids"))
    yield Candidate("d2t is wrong, t2d is not", replace(base, vocabulary_map="membership"))
    yield Candidate("d2t is no map", replace(base, vocabulary_map="identity"))


def _shifted(
    config: Eagle3Config, layers: tuple[int, ...], shift: int, depth: int
) -> Reading | None:
    """Taps one layer on or back; by the convention alone where the other one means just that."""
    moved = tuple(layer + shift for layer in layers)
    if min(moved) < 0 or max(moved) > depth:
        return None
    match config.tap_convention, shift:
        case "output_of", -1:
            return replace(config.reading, tap_convention="input_to")
        case "input_to", 1:
            return replace(config.reading, tap_convention="output_of")
    return replace(config.reading, tap_ids=moved, tap_convention="input_to")


def near(taps: tuple[int, ...], depth: int) -> set[int]:
    """Everything that a shifted reading may ask for."""
    near = {layer + shift for layer in taps for shift in (-1, 0, 1)}
    return {layer for layer in near if 0 <= layer <= depth}
