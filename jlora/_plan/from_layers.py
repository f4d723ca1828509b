"""The roles of weights by the classes of their layers.

A module of NNX or Equinox is a tree that has its layers for nodes; a model of Keras
lists them.  No framework is imported here: if the user has not imported it, a tree has
none of its layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jlora._plan.spec import einsum_axes
from jlora._tree.paths import flatten_with_keys, path_of
from jlora._tree.variables import is_model

# (kind, roles of the last axes) of each weight of a layer, by attribute.
Told = dict[str, tuple[str, str]]


def _nnx(nnx: Any) -> dict[type, Callable[[Any], Told]]:
    def spatial(layer: Any) -> str:
        return "i" * len(layer.kernel_size)

    def general(layer: Any) -> Told:
        batch, ins, outs = layer.batch_axis, layer.in_features, layer.out_features
        axes = "b" * len(batch) + "i" * len(ins) + "o" * len(outs)
        return {"kernel": ("dense", axes)}

    def einsum(layer: Any) -> Told:
        axes = einsum_axes(layer.einsum_str, len(layer.kernel_shape))
        return {"kernel": ("dense", axes)}

    def transposed(layer: Any) -> Told:
        axes = "oi" if layer.transpose_kernel else "io"
        return {"kernel": ("conv", spatial(layer) + axes)}

    return {
        nnx.Linear: lambda layer: {"kernel": ("dense", "io")},
        nnx.LinearGeneral: general,
        nnx.Einsum: einsum,
        nnx.Conv: lambda layer: {"kernel": ("conv", spatial(layer) + "io")},
        nnx.ConvTranspose: transposed,
        nnx.Embed: lambda layer: {"embedding": ("embed", "io")},
    }


def _equinox(nn: Any) -> dict[type, Callable[[Any], Told]]:
    def conv(layer: Any) -> Told:
        return {"weight": ("conv", "oi" + "i" * len(layer.kernel_size))}

    def cell(layer: Any) -> Told:
        return {"weight_ih": ("dense", "oi"), "weight_hh": ("dense", "oi")}

    return {
        nn.Linear: lambda layer: {"weight": ("dense", "oi")},
        nn.Conv: conv,
        nn.ConvTranspose: conv,
        nn.Embedding: lambda layer: {"weight": ("embed", "io")},
        nn.GRUCell: cell,
        nn.LSTMCell: cell,
    }


def _keras(layers: Any) -> dict[type, Callable[[Any], Told]]:
    def conv(axes: str, name: str = "kernel") -> Callable[[Any], Told]:
        return lambda layer: {name: ("conv", "i" * len(layer.kernel_size) + axes)}

    def separable(layer: Any) -> Told:
        return conv("oo", "depthwise_kernel")(layer) | conv("io", "pointwise_kernel")(
            layer
        )

    def einsum(layer: Any) -> Told:
        axes = einsum_axes(layer.equation, layer.kernel.ndim)
        return {"kernel": ("dense", axes)}

    def cell(layer: Any) -> Told:
        return {"kernel": ("dense", "io"), "recurrent_kernel": ("dense", "io")}

    dims = "1D", "2D", "3D"
    return {
        layers.Dense: lambda layer: {"kernel": ("dense", "io")},
        layers.EinsumDense: einsum,
        layers.Embedding: lambda layer: {"embeddings": ("embed", "io")},
        **{getattr(layers, f"Conv{n}"): conv("io") for n in dims},
        **{getattr(layers, f"Conv{n}Transpose"): conv("oi") for n in dims},
        **{getattr(layers, f"DepthwiseConv{n}"): conv("oo") for n in dims[:2]},
        **{getattr(layers, f"SeparableConv{n}"): separable for n in dims[:2]},
        **dict.fromkeys([layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell], cell),
    }


# How the layers of each framework are read, by the module that has them.
_FRAMEWORKS = {"flax.nnx": _nnx, "equinox.nn": _equinox, "keras.layers": _keras}


def from_layers(tree: Any) -> dict[str, tuple[str, str]]:
    """(kind, roles) of each weight of a layer whose class is known, by path.

    The roles are those of the weight's last axes: the layers of a stack have more axes,
    and these come first.
    """
    found = [m for m in _FRAMEWORKS if m in sys.modules]
    readers = {k: r for m in found for k, r in _FRAMEWORKS[m](sys.modules[m]).items()}
    told: dict[str, tuple[str, str]] = {}
    for keys, layer in _layers(tree, tuple(readers)):
        cls = next(c for c in type(layer).__mro__ if c in readers)
        for attribute, roles in readers[cls](layer).items():
            if (path := _path(keys, layer, attribute)) is not None:
                told[path] = roles
    return told


def _layers(tree: Any, kinds: tuple[type, ...]) -> list[tuple[Any, Any]]:
    """The layers of these classes in a tree, with their key paths."""

    def known(x: Any) -> bool:
        return isinstance(x, kinds)

    if is_model(tree):
        # Keras has no public function that lists the layers inside of layers.
        return [((), x) for x in tree._flatten_layers() if known(x)]
    if not kinds:
        return []
    pairs, _ = flatten_with_keys(tree, known)
    return [(keys, x) for keys, x in pairs if known(x)]


def _path(keys: Any, layer: Any, attribute: str) -> str | None:
    """The path of a layer's weight in the tree; None if the layer has none."""
    if is_model(layer):
        return getattr(getattr(layer, attribute, None), "path", None)
    own, _ = flatten_with_keys(layer)
    names = (path_of((*keys, *k)) for k, _ in own if path_of(k) == attribute)
    return next(names, None)
