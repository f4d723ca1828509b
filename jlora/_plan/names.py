"""The roles of weights by their names, and by the shapes of the arrays beside them.

The bias beside a kernel shows which axes come out.  The arrays below a node show
whether they are stacks of layers.  Libraries share names.  None of it is sure:
the first lifted trace holds the roles to the use.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence

from jlora._tree.by_path import is_bias

# The names of weights whose first axes are in axes, as JAX's libraries have them.
_WEIGHT = re.compile(
    r"kernel|.*_kernel|w\d*|w[a-z]?_.*|.*_w|[qkvo]_?proj|w[qkvo]|linear|lm_head|"
    r"(up|down|gate)_proj"
)
# Those of torch, which has the out axes first; some ports keep that, and some do not.
_TORCH = re.compile(r"weights?|.*[._]weights?")
_EMBEDDING = re.compile(
    r"((.*_)?(tok|token|word|type|pos|position|input|shared)_?)?"
    r"emb(ed(dings?|s|_tokens)?)?|embedding_table|wte|wpe"
)
_NORM = re.compile(r"(.*_)?(norm|ln|bn|layernorm|batchnorm)(_.*)?", re.I)
# What no product reads, besides a bias: a vector for each feature.
_VECTOR = re.compile(r"(.*[._])?(scales?|offset|gamma\d*|beta\d*|mean|var|count|gain)")
# The roles of a weight with so many axes, if its layer has one of these names.
_LAYERS = {
    # Attention's projections into heads, and the one out of them.
    (3, "ioo"): r"(.*_)?(query|key|value|q|k|v|wq|wk|wv|[qkv]_?proj|to_[qkv])(_proj)?",
    (3, "iio"): r"(.*_)?(out|o|wo|o_?proj|out_?proj|output_proj|attention_output|"
    r"attn_out|to_out|attn_vec_einsum)",
    # Gemma's einsums: the heads, or the two halves of a gate, come first.
    (3, "oio"): r"q_einsum|gating_einsum",
    (4, "ooio"): r"kv_einsum|qkv_einsum",
    (4, "oioo"): r"combined_qkv",
    # Experts.
    (3, "bio"): r"(.*_)?(up|down|gate)(_proj)?|wi(_\d)?|w[123]|experts",
}
_HEADS = re.compile("|".join(x for (_, axes), x in _LAYERS.items() if axes != "bio"))
_CONV = re.compile(r".*(conv|stem|patch|downsample|depthwise|pointwise).*", re.I)
_TRANSPOSED = re.compile(r"conv\d_?d_transpose.*", re.I)  # Haiku's and Keras's


def is_called_vector(path: str) -> bool:
    """Whether its own name is that of a bias, a scale or a statistic."""
    return is_bias(path) or _VECTOR.fullmatch(_keys(path)[-1]) is not None


def is_vector(path: str) -> bool:
    """Whether its own name or its norm says that it is one; no kernel is."""
    *_, parent, name = _keys(path)
    of_norm = _NORM.fullmatch(parent) and not name.endswith("kernel")
    return is_called_vector(path) or bool(of_norm)


def _is_embedding(path: str) -> bool:
    *_, parent, name = _keys(path)
    own = "embedding", "weight", "w"
    return bool(
        _EMBEDDING.fullmatch(name) or (name in own and _EMBEDDING.fullmatch(parent))
    )


def is_table(path: str) -> bool:
    """Whether the name is that of an embedding, of words or of positions."""
    return re.search("embed|pos|token|cls|wte|wpe", path, re.I) is not None


def is_weight(path: str, ndim: int) -> bool:
    """Whether the name is that of a weight, so that its roles have to be known."""
    name = _keys(path)[-1]
    if ndim < 2 or is_vector(path) or (ndim == 2 and _is_embedding(path)):
        return False
    if _WEIGHT.fullmatch(name) or _TORCH.fullmatch(name):
        return True
    return any(ndim >= n and re.fullmatch(x, name) for (n, _), x in _LAYERS.items())


def _keys(path: str) -> list[str]:
    """The keys of a path, without the number that tells equal ones apart."""
    return ["", "", *(re.sub(r"(?<=[a-z])_\d+$", "", key) for key in path.split("/"))]


class Names:
    """What names and shapes of a tree tell of its weights.

    Args:
      shapes: the shape of each array, by path.
      biases: the path of the bias beside each array, or None, by path.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], biases: Mapping[str, str | None]
    ):
        # A bias that stands beside several arrays may be of any of them.
        shared = collections.Counter(biases.values())
        self._shapes = shapes
        self._biases = {
            p: b if shared[b] == 1 or is_weight(p, len(shapes[p])) else None
            for p, b in biases.items()
        }
        self._stacks = _stacks(shapes)
        # The roles that biases show of matrices, by their last key.  Where they are all
        # the same, they are those of the matrices of which no bias shows the roles.
        self._habits: dict[str, set[str]] = {}
        for path in shapes:
            if len(shown := self._shown(path)) == 1 and len(shown[0]) == 2:
                self._habits.setdefault(_keys(path)[-1], set()).update(shown)

    def told(self, path: str) -> tuple[str, str] | None:
        """(kind, roles) of a weight; None if they cannot be told."""
        *_, parent, name = _keys(path)
        stack = self._stacks[path]
        ndim = len(self._shapes[path]) - len(stack)
        if ndim < 2 or is_vector(path):
            return None
        shown, habit = self._shown(path), self._habits.get(name, set())
        if ndim > 2 and not shown and self._biases[path] is not None:
            return None  # the bias fits none of the roles that a name may tell
        kind, axes = "dense", None
        if ndim == 2 and _is_embedding(path):
            kind, axes = "embed", "io"
        elif len(shown) == 1:
            (axes,) = shown
        elif ndim == 2 and len(habit) == 1:
            (axes,) = habit
        else:
            axes = _by_name(parent, name, _without(self._shapes[path], stack))
        if axes is None or (shown and kind != "embed" and axes not in shown):
            return None
        if ndim > 3 or (ndim == 3 and _CONV.fullmatch(parent)):
            kind = "conv" if "i" * (ndim - 2) in axes else kind
        for k in stack:
            axes = axes[:k] + "b" + axes[k:]
        return kind, axes

    def _shown(self, path: str) -> list[str]:
        """The roles that the bias beside a weight allows, without those of a stack."""
        bias = self._biases[path]
        if bias is None or self._stacks[path] != self._stacks[bias]:
            return []
        stack = self._stacks[path]
        shape = _without(self._shapes[path], stack)
        out = [n for n in _without(self._shapes[bias], stack) if n != 1]
        n, m = len(shape), len(out)
        if not 0 < m < n:
            return []
        ends, starts = shape[-m:] == out, shape[:m] == out
        shown = ["i" * (n - m) + "o" * m] if ends else []
        shown += ["o" * m + "i" * (n - m)] if starts else []
        if m == 1 and n > 2 and shape[-2:-1] == out:
            # A transposed convolution may have the out axis before the in axis.
            if not shown or _TRANSPOSED.fullmatch(_keys(path)[-2]):
                shown.append("i" * (n - 2) + "oi")
        return shown


def _by_name(parent: str, name: str, shape: Sequence[int]) -> str | None:
    """The roles by the names of a weight and of its layer."""
    ndim = len(shape)
    if ndim == 2:
        return "io" if _WEIGHT.fullmatch(name) else None
    own = name in ("kernel", "w", "weight")
    for (n, axes), pattern in _LAYERS.items():
        if n == ndim and re.fullmatch(pattern, parent if own else name):
            return axes
    square = ndim > 3 and len({*shape[: ndim - 2]}) == 1  # as spatial axes are
    if name in ("kernel", "w") and ndim <= 5 and (square or _CONV.fullmatch(parent)):
        if shape[-1] == 1 < shape[-2] and "depthwise" in parent:
            return "i" * (ndim - 2) + "oo"
        return "i" * (ndim - 2) + ("oi" if _TRANSPOSED.fullmatch(parent) else "io")
    return None


def _without(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [n for k, n in enumerate(shape) if k not in axes]


def _stacks(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Which of each array's axes are those of a stack of layers, by path.

    A scan may have them first, or second.
    """
    below: dict[str, list[str]] = {}
    for path in shapes:
        keys = path.split("/")
        for k in range(len(keys) - 1):
            below.setdefault("/".join(keys[:k]), []).append(path)
    found: dict[str, tuple[int, ...]] = dict.fromkeys(shapes, ())
    for node in sorted(below, key=len):
        paths = below[node]
        done = found[paths[0]]
        if any(found[p] != done for p in paths):
            continue
        for at in (0, 1) if not done else (len(done),):
            if _is_stack({p: _without(shapes[p], done) for p in paths}, at):
                found.update(dict.fromkeys(paths, (*done, at)))
                break
    return found


def _is_stack(shapes: Mapping[str, Sequence[int]], at: int) -> bool:
    """Whether all arrays below a node are stacks of layers along this axis.

    Then this axis has one size in all of them, each has another axis, each weight two,
    and they are of several layers.
    """
    if any(len(s) < 2 for s in shapes.values()):
        return False
    weights = [p for p in shapes if is_weight(p, len(shapes[p]))]
    if not weights or any(len(shapes[p]) < 3 for p in weights):
        return False
    if len({s[at] for s in shapes.values()}) > 1:
        return False
    names = [_keys(p)[-2:] for p in weights]
    if any(is_vector(p) for p in shapes):
        # A vector for each layer.  A bias of heads is beside the weight of one layer.
        return len({p.rpartition("/")[0] for p in shapes}) > 1
    # Without vectors, convolutions or projections of heads may look the same.
    return (
        not at
        and len({tuple(shapes[p]) for p in weights}) > 1
        and not any(_CONV.fullmatch(key) or _HEADS.fullmatch(key) for key, _ in names)
        and not any(_HEADS.fullmatch(name) for _, name in names)
    )
