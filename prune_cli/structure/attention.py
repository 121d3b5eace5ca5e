"""What modules say of attention: how many heads they have, which weight makes their queries, whose code they run."""

from __future__ import annotations

from functools import lru_cache

from torch import nn

HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
# Attention that derives its head size from the width of its input: module class -> name of the joint projection's
# weight. Here the embedding and the attention shrink together, equal positions in every head.
TIED_ATTENTION = {
    "MultiheadAttention": "in_proj_weight",  # or "q_proj_weight", where keys and values have widths of their own
    "ShiftedWindowAttention": "qkv.weight",
    "ShiftedWindowAttentionV2": "qkv.weight",
    "RelativePositionalMultiHeadAttention": "to_qkv.weight",
}


def code_of(module: nn.Module | None) -> str:
    """Names the code that a module runs; "" for single layers, which say nothing about the code around them."""
    if module is None:
        return ""
    kind = type(module)
    if not module._modules and kind.__module__.startswith("torch.nn"):
        return ""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_heads(module: nn.Module | None) -> bool:
    """Whether a module says how many attention heads it has."""
    if module is None:
        return False
    plain = module.__dict__
    places = (plain, plain["_modules"], plain["_parameters"], plain["_buffers"])
    kind: type = type(module)
    return _class_has_heads(kind) or not all(place.keys().isdisjoint(HEAD_COUNTS) for place in places)


@lru_cache(maxsize=4096)
def _class_has_heads(kind: type) -> bool:
    return any(hasattr(kind, name) for name in HEAD_COUNTS)


def query_projection(module: nn.Module) -> str | None:
    """The name of the weight that makes the queries: (3 * width, width) with keys and values, else (width, width)."""
    square = None
    for name, parameter in module.named_parameters():
        if name.count(".") > 1 or parameter.dim() != 2:
            continue
        if parameter.shape[0] == 3 * parameter.shape[1]:
            return name
        if square is None and parameter.shape[0] == parameter.shape[1] and name.startswith(("q", "to_q", "wq")):
            square = name
    return square


def known(module: nn.Module | None) -> bool:
    """Whether this is attention whose code is known here."""
    return type(module).__name__ in TIED_ATTENTION


def scales_queries(module: nn.Module | None) -> bool:
    """Whether a factor in this module's code may go into the weight that makes its queries."""
    return module is not None and code_of(module) != "" and query_projection(module) is not None
