"""What a tensor of a target or a draft is for, by its name in files or in memory."""

import re

GROUPS = (  # first match wins
    ("vocabulary maps", r"(^|\.)[dt]2[td]$"),
    ("vision", r"vision_model|multi_modal_projector"),
    ("embedding", r"embed_tokens"),
    ("head", r"lm_head"),
    ("fusion (fc)", r"(^|\.)fc\."),
    ("norms", r"norm"),
    ("attention", r"self_attn"),
    ("router", r"\.router"),
    ("shared expert", r"shared_expert"),
    ("routed experts", r"\.experts"),
    ("dense feed-forward", r"mlp|feed_forward"),
    ("other", r""),
)
NAMES = tuple(name for name, _ in GROUPS)


def group_of(tensor: str) -> str:
    """One of `NAMES`."""
    return next(name for name, pattern in GROUPS if re.search(pattern, tensor))
