"""Models on a cache of FP8 codes.

Regimes: the same logits as a float32 cache whose rows were rounded through FP8 by hand, on chains
and trees with a scattered path; scales per tensor and per head; values beyond the range; NaN;
rings; the draft's cache; refusals. The kernels' own FP8 numerics are in tests/kernels: Triton's
interpreter rounds to FP8 wrongly, so here its rows are only compared with each other.
"""

import pytest
import torch

from aerie.eagle3.generate import generate
from aerie.kernels.attention_prologue import attention_prologue_ref
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.kv_scales import KVScales
from aerie.llama4.step import Tree

FP8 = torch.float8_e4m3fn
TREE = Tree((-1, 0, 0, 1, 1, 2, 3, 6))


def run(target, ids, kv_cache_dtype="auto"):
    """Logits of a prompt in two parts, of a tree, and of a chain behind a path of it."""
    cache = target.allocate_cache(80, 1, 8, max_step_rows=20, kv_cache_dtype=kv_cache_dtype)
    assert len(cache.pools) == 2
    logits = []
    for count in (20, 13):
        part = ids[cache.lengths[0] :][:count]
        logits.append(target(part, cache.causal_step(count)).logits_TV)
        cache.commit(0, range(count))
    logits.append(target(ids[33:41], cache.tree_step(TREE)).logits_TV)
    cache.commit(0, [0, 1, 3, 6, 7])
    logits.append(target(ids[41:45], cache.causal_step(4)).logits_TV)
    return torch.cat(logits)


def round_by_hand(attention, scales: KVScales) -> None:
    """Makes an attention round what it puts into a float32 cache to code * scale."""

    def prologue(qkv_TF, k_RCGK, v_RCGK, slots_T, *, k_scale, v_scale, **named):
        assert k_scale is None
        assert v_scale is None
        q_THK = attention_prologue_ref(qkv_TF, k_RCGK, v_RCGK, slots_T, **named)
        for cache, scale in ((k_RCGK, scales.k_scale), (v_RCGK, scales.v_scale)):
            flat = cache.flatten(0, 1)
            codes = (flat[slots_T] / scale[:, None]).clamp(-448, 448).to(FP8)
            flat[slots_T] = codes.float() * scale[:, None]
        return q_THK

    attention._prologue = prologue


@pytest.mark.parametrize("num_scales", [None, 1, 2])
def test_logits_are_those_of_rounded_keys_and_values(num_scales, make_pair, assert_close):
    target, ids = make_pair(0).ours, torch.randint(0, 96, (45,))
    attentions = [layer.self_attn for layer in target.model.layers]
    for attention in attentions:
        if num_scales is not None:
            attention.kv_scales = KVScales(*(0.02 + torch.rand(2, num_scales) / 20))
    exact, fp8 = run(target, ids), run(target, ids, "fp8")
    for attention in attentions:
        round_by_hand(attention, attention.kv_scales)
    assert_close(fp8, run(target, ids), 1e-4)  # a sum's last bit can change a code
    difference = (fp8 - exact).norm() / exact.norm()
    assert 1e-2 < difference < 0.25  # these weights spread far wider than trained ones


def test_triton_backend(make_pair, assert_close):
    """A chain of three rows, and the same rows one by one."""
    target = make_pair(2, "triton", num_hidden_layers=2, moe_layers=[]).ours
    ids, logits = torch.randint(0, 96, (3,)), []
    for counts in ([3], [1, 1, 1]):
        cache = target.allocate_cache(16, page_size=4, kv_cache_dtype="fp8")
        parts = []
        for part in ids.split(counts):
            parts.append(target(part, cache.causal_step(len(part))).logits_TV)
            cache.commit(0, range(len(part)))
        logits.append(torch.cat(parts))
    assert_close(logits[0], logits[1], 1e-4)


def test_codes_saturate_and_nan_stays(make_pair):
    target, ids = make_pair(0).ours, torch.randint(0, 96, (12,))
    for layer in target.model.layers:
        layer.self_attn.kv_scales = KVScales(torch.full((1,), 1e-3), torch.full((1,), 1e-3))
    cache = target.allocate_cache(12, page_size=4, kv_cache_dtype="fp8")
    assert target(ids, cache.causal_step(12)).logits_TV.isfinite().all()
    values = cache.layers[0].v_RCGK.float()
    assert values.abs().max() == 448
    assert (values == 448).any()
    assert (values == -448).any()
    target.model.embed_tokens.weight.data[int(ids[3])] = torch.nan
    target(ids, cache.causal_step(12))
    assert cache.layers[0].v_RCGK[0, 3].float().isnan().all()


def test_an_fp8_cache_takes_a_byte_per_number(make_pair):
    target = make_pair(0).ours
    plain, fp8 = (target.allocate_cache(64, kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    assert [kv.k_RCGK.dtype for kv in fp8.layers] == [FP8] * 4
    assert 4 * fp8.pools[0].k_LRCGK.nbytes == plain.pools[0].k_LRCGK.nbytes
    assert plain.layers[0].k_scale is None
    assert fp8.layers[0].k_scale is not None


def test_commit_moves_codes():
    cache = PagedKVCache(2, 1, 2, 20, page_size=4, dtype=FP8)
    cache.causal_step(6)
    codes = torch.arange(24, dtype=torch.uint8)
    for kv in cache.layers:
        kv.k_RCGK.view(torch.uint8).flatten()[:24] = codes
    cache.commit(0, [0, 2, 5])
    for kv in cache.layers:
        rows = kv.k_RCGK.view(torch.uint8).flatten(0, 2)
        assert rows[:3].tolist() == [[0, 1], [4, 5], [10, 11]]


def test_rejects_other_cache_dtypes(make_pair):
    target = make_pair(0).ours
    with pytest.raises(ValueError, match="kv_cache_dtype: must be 'auto' or 'fp8', got 'int8'"):
        generate(target, [1, 2], 3, kv_cache_dtype="int8")
