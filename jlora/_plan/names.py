"""The roles of weights by their names, and by the shapes of the arrays beside them.

The bias beside a kernel shows which axes come out.  The arrays below a node show
whether they are stacks of layers.  Libraries share names.  None of it is sure: the
first lifted trace holds the roles to the use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# The names of weights whose first axes are in axes, as JAX's libraries have them.
_WEIGHT = re.compile(
    r"kernel|.*_kernel|w\d*|w_.*|.*_w|[qkvo]_?proj|w[qkvo]|(up|down|gate)_proj"
)
# Those of torch, which has the out axes first; some ports keep that, and some do not.
_TORCH = re.compile(r"weights?|.*[._]weights?")
_EMBEDDING = re.compile(
    r"embedding|embeddings|embedding_table|input_embedding|token_embedding|wte|wpe"
)
# What no product reads: a bias, or a vector for each feature.
_VECTOR = re.compile(
    r"(.*[._])?(bias(es)?|b\d*|scales?|offset|gamma|beta|mean|var|count|gain)"
)
# Attention's projections into heads, and the one out of them.
_INTO = re.compile(
    r"(.*_)?(query|key|value|q|k|v|wq|wk|wv|[qkv]_?proj|to_[qkv])(_proj|_kernel)?"
)
_OUT_OF = re.compile(
    r"(.*_)?(out|o|wo|o_?proj|out_?proj|output_proj|attention_output|attn_out|to_out|"
    r"c_proj|dense)(_kernel)?"
)
# Gemma's einsums: the kernels of its projections have the heads first.
_EINSUMS = {
    "q_einsum": "oio",
    "kv_einsum": "ooio",
    "qkv_einsum": "ooio",
    "attn_vec_einsum": "iio",
    "gating_einsum": "oio",
}
_CONV = re.compile(r".*(conv|stem|patch|downsample|depthwise|pointwise).*", re.I)
_TRANSPOSED = re.compile(r"conv\d_?d_transpose.*", re.I)  # Haiku's and Keras's


def is_vector(path: str) -> bool:
    """Whether the name is that of a bias, a scale or a statistic."""
    return _VECTOR.fullmatch(_keys(path)[-1]) is not None


def is_table(path: str) -> bool:
    """Whether the name is that of an embedding, of words or of positions."""
    return re.search("embed|pos|token|cls|wte|wpe", path, re.I) is not None


def is_weight(path: str, ndim: int) -> bool:
    """Whether the name is that of a weight, so that its roles have to be known."""
    *_, parent, name = _keys(path)
    if ndim < 2 or is_vector(path) or _EMBEDDING.fullmatch(name):
        return False
    if _WEIGHT.fullmatch(name) or _TORCH.fullmatch(name):
        return True
    return ndim > 2 and bool(_INTO.fullmatch(name) or name in _EINSUMS)


def _keys(path: str) -> list[str]:
    return ["", "", *path.split("/")]


def told(
    path: str, shape: Sequence[int], bias: Sequence[int] | None, stacked: int
) -> tuple[str, str] | None:
    """(kind, roles) of a weight; None if they cannot be told.

    Args:
      path: its path.
      shape: its shape.
      bias: the shape of the bias beside it, or None.
      stacked: how many of its first axes are those of a stack of layers.
    """
    rest = tuple(shape[stacked:])
    if len(rest) < 2:
        return None
    *_, parent, name = _keys(path)
    if bias is not None:
        bias = [n for n in bias[stacked:] if n != 1]
    fits = _fits(rest, bias)
    found = _by_name(parent, name, len(rest), fits)
    if found is None and bias is not None and len(fits) == 1:
        conv = _CONV.fullmatch(parent) and len(rest) > 2
        found = "conv" if conv else "dense", fits[0]
    if found is None or (found[0] != "embed" and fits and found[1] not in fits):
        return None
    kind, axes = found
    return kind, "b" * stacked + axes


def _fits(shape: Sequence[int], bias: Sequence[int] | None) -> list[str]:
    """The roles that the shape of a bias allows."""
    if not bias or len(bias) >= len(shape):
        return []
    n, m = len(shape), len(bias)
    fits = []
    if list(shape[-m:]) == list(bias):
        fits.append("i" * (n - m) + "o" * m)
    if list(shape[:m]) == list(bias):
        fits.append("o" * m + "i" * (n - m))
    # A transposed convolution's kernel may have the out axis before the in axis.
    if m == 1 and n > 2 and shape[-2] == bias[0]:
        fits.append("i" * (n - 2) + "oi")
    return fits


def _by_name(
    parent: str, name: str, ndim: int, fits: Sequence[str]
) -> tuple[str, str] | None:
    """(kind, roles) by the names of a weight and of its layer."""
    if ndim == 2 and _EMBEDDING.fullmatch(name):
        return "embed", "io"
    if parent in _EINSUMS and ndim == len(_EINSUMS[parent]):
        return "dense", _EINSUMS[parent]
    if name in _EINSUMS and ndim == len(_EINSUMS[name]):
        return "dense", _EINSUMS[name]
    if ndim == 2 and _WEIGHT.fullmatch(name):
        return "dense", "io"
    weight = name in ("kernel", "w", "weight")
    layer = parent if weight else name
    if ndim == 3 and _INTO.fullmatch(layer):
        return "dense", "ioo"
    if ndim == 3 and _OUT_OF.fullmatch(layer):
        return "dense", "iio"
    if weight and name != "weight" and 3 <= ndim <= 5 and _CONV.fullmatch(parent):
        axes = "oi" if _TRANSPOSED.fullmatch(parent) else "io"
        return "conv", "i" * (ndim - 2) + axes
    return None


def stacks(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many of each array's first axes are those of a stack of layers, by path.

    The arrays below a node are such a stack if their first axes are all of one size, if
    each has at least one axis more, and weights two, and if they are of several layers.
    """
    below: dict[str, list[str]] = {}
    for path in shapes:
        keys = path.split("/")
        for k in range(len(keys) - 1):
            below.setdefault("/".join(keys[:k]), []).append(path)
    found = dict.fromkeys(shapes, 0)
    for node in sorted(below, key=len):
        paths = below[node]
        done = found[paths[0]]
        if len({found[p] for p in paths}) == 1 and _is_stack(
            {p: shapes[p][done:] for p in paths}
        ):
            found.update(dict.fromkeys(paths, done + 1))
    return found


def _is_stack(shapes: Mapping[str, Sequence[int]]) -> bool:
    if any(len(s) < 2 for s in shapes.values()):
        return False
    if len({s[0] for s in shapes.values()}) > 1:
        return False
    weights = [p for p in shapes if is_weight(p, len(shapes[p]))]
    if not weights or any(len(shapes[p]) < 3 for p in weights):
        return False
    layers = {p.rpartition("/")[0] for p in weights}
    if any(is_vector(p) for p in shapes):
        # A vector for each layer.  A bias of heads is beside the weight of one layer.
        return len({p.rpartition("/")[0] for p in shapes}) > 1
    # Without vectors: weights of several layers that are neither convolutions nor
    # projections of one attention.
    names = [_keys(p)[-2:] for p in weights]
    plain = not any(_CONV.fullmatch(parent) for parent, _ in names)
    return (
        plain
        and len(layers) + len({name for _, name in names}) > 2
        and not all(_INTO.fullmatch(key) for key, _ in names)
        and not all(_INTO.fullmatch(key) for _, key in names)
    )
