"""Any single corruption of a target is reported by its tensor's name, or provably changes nothing.

Every FP8 format and the unquantised one are damaged in kind: a tensor lost, renamed, doubled,
reshaped, retyped, or with a value that cannot be. A damage that loads must leave every projection,
every other weight and every scale as the intact file has them.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM
from tests.llama4.fp8_files import FORMATS, FP8, Checkpoint, projections, unquantised
from tests.llama4.test_fp8_formats import attention_of, in_memory

NAN_CODE = 0x7F
WRONG_TYPES = (torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e5m2)


def plain() -> Checkpoint:
    """Nothing quantised, experts one by one."""
    made = Checkpoint(unquantised({}), None)
    experts = {name: shape for name, shape in projections().items() if ".experts." in name}
    made.tensors |= {f"{name}.weight": torch.randn(shape) for name, shape in experts.items()}
    return made


MADE = {name: build() for name, build in (FORMATS | {"unquantised": plain}).items()}


def damage(draw, tensors: dict[str, Tensor]) -> set[str]:
    """One corruption, in place; the tensor's name, and another that it got."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name] = tensors[name].clone()
    match draw(st.sampled_from(["lost", "renamed", "doubled", "shape", "type", "value"])):
        case "lost":
            del tensors[name]
        case "renamed":
            other = draw(st.sampled_from([f"{name}.x", name.upper(), f"x.{name}", name[:-1]]))
            tensors[other] = tensors.pop(name)
            return {name, other}
        case "doubled":
            tensors[f"language_model.{name}"] = tensor.clone()
        case "shape":
            tensors[name] = _reshaped(draw, tensor).contiguous().clone()
        case "type":
            tensors[name] = tensor.float().to(draw(st.sampled_from(WRONG_TYPES)))
        case "value":
            _spoil(draw, tensor, name)
    return {name}


def other_name(name: str) -> str:
    """A missing scale is called by one of the names that files have for it."""
    return name.removesuffix("_inv").replace("proj_weight_scale", "proj_scale")


def _reshaped(draw, tensor: Tensor) -> Tensor:
    """Fewer numbers, more of them, or the same ones in another order or rank."""
    forms = [tensor[None], torch.stack([tensor, tensor])]
    if tensor.ndim:
        forms += [tensor[:-1], tensor.flatten()]
        if tensor.shape[0] != tensor.shape[-1]:  # a square one does not show it
            forms.append(tensor.transpose(0, -1))
    return draw(st.sampled_from(forms))


def _spoil(draw, tensor: Tensor, name: str) -> None:
    place = draw(st.integers(0, tensor.numel() - 1))
    if tensor.dtype == FP8:
        tensor.view(torch.uint8).view(-1)[place] = NAN_CODE + draw(st.sampled_from([0, 128]))
        return
    wrong = [torch.nan, torch.inf, -torch.inf] + ([0.0, -1.0] if "scale" in name else [])
    tensor.view(-1)[place] = draw(st.sampled_from(wrong))


def held(folder: Path) -> dict[str, Tensor]:
    """Everything of a loaded model that a file decides, dequantised."""
    model = Llama4ForCausalLM.from_pretrained(folder, backend="eager")
    found = dict(in_memory(model))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype != FP8:
            found[f"stored {name}"] = tensor
    for layer in range(2):
        scales = attention_of(model, layer).kv_scales
        found |= {f"k_scale {layer}": scales.k_scale, f"v_scale {layer}": scales.v_scale}
    return found


@cache
def intact(form: str) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        return held(MADE[form].write(Path(folder)))


@pytest.mark.parametrize("form", MADE)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_damaged_tensor_is_reported_or_changes_nothing(form, tmp_path_factory, data):
    spoilt = Checkpoint(dict(MADE[form].tensors), MADE[form].config)
    names = damage(data.draw, spoilt.tensors)
    folder = spoilt.write(tmp_path_factory.mktemp("damaged"))
    try:
        found, complaint = held(folder), ""
    except CheckpointError as error:
        found, complaint = None, str(error)
    if found is None:
        assert any(name in complaint for name in names | set(map(other_name, names)))
    else:
        expected = intact(form)
        assert found.keys() == expected.keys()
        changed = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
        assert changed == []
