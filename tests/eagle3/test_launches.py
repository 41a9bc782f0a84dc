"""How many kernels one recycled draft level launches: forward pass and top token, no host work.

Counted in a profile of the real path: every Triton launch, and every PyTorch operation that would
launch a kernel on a GPU (views and allocations do not). Positions, slots and rotations are not
among them: a chain asks for those of all its levels at once (`successive_steps`).
"""

from collections import Counter

import pytest
import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from aerie.kernels import backend, tree_attention
from aerie.llama4.device_steps import successive_steps

LAUNCH = "triton launch"
EXPECTED = {
    "_qkv_projection_kernel": 1,
    "_attention_prologue_kernel": 1,
    "_tree_attention_kernel": 1,
    "_linear_kernel": 2,  # o_proj, down_proj
    "_rms_norm_kernel": 2,  # after the attention, and the final norm
    "_gate_up_kernel": 1,
    "_draft_vocab_kernel": 1,
    "_draft_vocab_merge_kernel": 1,
}
# rows of no sequence must be zero: a memset of the attention's output, or the merge of its shares
SHORT, LONG = {"aten::zero_": 1}, {"_tree_attention_merge_kernel": 1}
NO_KERNEL = ("empty", "view", "as_strided", "slice", "select", "split", "transpose", "detach")


def launches(profiled: profile) -> Counter[str]:
    """Kernels by name: those of Triton, and `aten::` operations outside of them."""
    found: Counter[str] = Counter()
    for event in profiled.events() or ():
        inside = event.cpu_parent
        while inside is not None and not inside.name.startswith(LAUNCH):
            inside = inside.cpu_parent
        if event.name.startswith(LAUNCH):
            found[event.name.removeprefix(f"{LAUNCH} ")] += 1
        elif inside is None and _launches_itself(event):
            found[event.name] += 1
    return found


def _launches_itself(event) -> bool:
    calls_another = any(child.name.startswith("aten::") for child in event.cpu_children)
    is_free = any(word in event.name for word in NO_KERNEL)
    return event.name.startswith("aten::") and not calls_another and not is_free


@pytest.mark.parametrize(("max_length", "of_attention"), [(16, SHORT), (1024, LONG)])
def test_launches_of_a_recycled_level(
    max_length, of_attention, draft_files, make_target, load_draft, monkeypatch
):
    kernel_type = type(backend._probe)
    plain = kernel_type.__getitem__

    def counted(kernel, grid):
        launch = plain(kernel, grid)

        def call(*arguments, **named):
            with record_function(f"{LAUNCH} {kernel.fn.__name__}"):
                return launch(*arguments, **named)

        return call

    monkeypatch.setattr(kernel_type, "__getitem__", counted)
    monkeypatch.setattr(tree_attention, "check_values", lambda *_: None)  # of CPU tensors alone
    draft = load_draft(draft_files("llama"), make_target(), "triton")
    (step,) = successive_steps(draft.allocate_cache(max_length), torch.tensor([2]), 1).steps
    turns = draft.rotation(step.rows.positions_T)
    ids, hidden = torch.tensor([3]), torch.randn(1, draft.config.hidden_size)
    torch.use_deterministic_algorithms(False)  # else allocations are filled with NaN
    draft.top_tokens(draft(ids, hidden, step, turns=turns).post_norm_TD, 1)  # zeroes its counters
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        draft.top_tokens(draft(ids, hidden, step, turns=turns).post_norm_TD, 1)
    assert launches(profiled) == EXPECTED | of_attention
