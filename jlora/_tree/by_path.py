"""The leaves of a tree: listed by path, mapped, and checked."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jlora._leaf import is_adapted, is_leaf
from jlora._leaf.base import is_base
from jlora._tree import boxes, paths
from jlora._tree.trace import is_array
from jlora._tree.variables import is_variable, refuse_layers, variables


def flatten(
    tree: Any,
) -> tuple[list[tuple[str, Any]], Callable[[Iterable[Any]], Any]]:
    """(path, leaf) pairs, and the function that makes the tree from new leaves.

    An adapted leaf is one leaf.
    """
    pairs, treedef = paths.flatten_with_keys(tree, is_leaf)

    def build(leaves: Iterable[Any]) -> Any:
        return boxes.fit(jax.tree.unflatten(treedef, leaves))

    return [(paths.path_of(keys), x) for keys, x in pairs], build


def map_leaves(fn: Callable[[str, Any], Any], tree: Any, *, share: bool = False) -> Any:
    """tree_map of fn(path, leaf), in which an adapted leaf is one leaf.

    NNX's variables in the tree are replaced by new ones.  With ``share`` a variable is
    kept if ``fn`` returns its leaf unchanged, so that no later write into it is lost.
    """
    pairs, build = flatten(tree)
    out = build(fn(path, x) for path, x in pairs)
    if not share or not variables(tree):
        return out
    old, treedef = jax.tree.flatten(tree, is_leaf=is_variable)
    new = jax.tree.leaves(out, is_leaf=is_variable)

    def same(x: Any, y: Any) -> bool:
        return is_variable(x) and x.get_raw_value() is y.get_raw_value()

    kept = [x if same(x, y) else y for x, y in zip(old, new, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def arrays(params: Any) -> dict[str, Any]:
    """The arrays of a plain tree by path; refuses an adapted or empty tree."""
    pairs, _ = flatten(params)
    out: dict[str, Any] = {}
    for path, x in pairs:
        if is_adapted(x):
            raise ValueError(
                f"{path!r} is adapted already: expected a plain params tree, found "
                f"{x!r}. Merge or unwrap the tree first (jlora.merge, jlora.unwrap)."
            )
        if path in out:
            raise ValueError(
                f"two leaves have the path {path!r}: an adapter could not tell them "
                "apart. Rename one of them (a key may not hold '/')."
            )
        if is_array(x) or is_base(x):
            out[path] = x
        elif hasattr(x, "shape") and hasattr(x, "dtype"):
            raise TypeError(
                f"{path!r} is a {type(x).__name__}: expected an array. Pass the arrays "
                "that it stands for, as variable.value is in Keras."
            )
    if not out:
        raise ValueError(_no_array(pairs))
    seen = variables(params)
    if len({*map(id, seen)}) < len(seen):
        raise ValueError(
            "a variable stands in two places of the module: expected it in one, since "
            "it would get two adapters. Split the module, whose state has it once: "
            "graph, state = nnx.split(module)."
        )
    return out


def _no_array(leaves: Sequence[tuple[str, Any]]) -> str:
    found, where = "an empty tree", "they are not made yet, or are not in it"
    if leaves:
        kinds = ", ".join(sorted({type(x).__name__ for _, x in leaves}))
        at = f" (at {leaves[0][0]!r})" if leaves[0][0] else ""
        found = f"no array, only {kinds}{at}"
        where = "they are not made yet, or are inside of objects that JAX takes whole"
    return (
        f"nothing to adapt: expected a tree of arrays, found {found}. The weights live "
        f"elsewhere: {where}. Pass the arrays, and plan and lift a function that takes "
        "them as an argument. In Linen and Haiku: params = model.init(key, x). In "
        "Keras, build the model: {v.path: v.value for v in model.trainable_variables}. "
        "In penzai: model, params = pz.unbind_params(model, freeze=True), and lambda "
        "params, x: pz.bind_variables(model, params)(x)."
    )


# As JAX's libraries and torch's call it: bias, b, fc1.bias, c_attn_b, b1, bias_hh, bq.
_BIAS = re.compile(r"(.*[._])?(bias(es)?|b)\d*|bias(es)?_.*|b_.*|b[qkvo]")


def is_bias(path: str) -> bool:
    """Whether the name is that of a bias."""
    return _BIAS.fullmatch(path.rpartition("/")[2]) is not None


def sibling_bias(path: str, leaves: Mapping[str, Any]) -> str | None:
    """The path of the bias beside a weight, found by its name; None without one."""
    parent, slash, name = path.rpartition("/")
    names = ["bias", "b"]
    # w1 and b1, fc1.weight and fc1.bias, c_attn_w and c_attn_b.
    for weight, bias in (("kernel", "bias"), ("weight", "bias"), ("w", "b")):
        own = re.sub(rf"(?<![a-z]){weight}(?![a-z])", bias, name)
        names += [own] if own != name else []
    names += ["1"] if name == "0" else []  # a list of pairs
    siblings = [f"{parent}{slash}{name}" for name in names]
    return next((s for s in siblings if s in leaves and s != path), None)


def others(tree: Any) -> dict[str, str]:
    """The arrays that are not parameters for their framework: what each is, by path.

    These are NNX's variables that are not a ``Param`` or belong to an adapter already,
    and Linen's collections other than ``params``.
    """
    found = {}
    if variables(tree):
        nnx = sys.modules["flax.nnx"]
        for keys, x in paths.flatten_with_keys(tree, is_variable)[0]:
            plain = isinstance(x, nnx.Param) and not isinstance(x, nnx.LoRAParam)
            if is_variable(x) and not plain:
                found[paths.path_of(keys)] = f"a {type(x).__name__}"
    elif isinstance(tree, Mapping) and "params" in tree:
        for path, _ in flatten(tree)[0]:
            if (collection := path.split("/")[0]) != "params":
                found[path] = f"in {collection!r}"
    return found


def has_adapted(tree: Any) -> bool:
    """Whether the tree has adapted leaves."""
    return any(is_adapted(x) for _, x in flatten(tree)[0])


def require_adapted(tree: Any, what: str, advice: str = "") -> None:
    """Raises ValueError for a tree without adapted leaves."""
    if not has_adapted(tree):
        if not advice:
            refuse_layers(tree, what)
        raise ValueError(
            f"{what}: the tree has no adapted leaf: expected the result of "
            f"jlora.wrap(params, ...), found plain params. {advice}".rstrip()
        )
