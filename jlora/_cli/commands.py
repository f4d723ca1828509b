"""What each command does.  Each returns the exit code: 0, or 1 for found wanting."""

from __future__ import annotations

import importlib
import inspect as inspect_module
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jlora._arithmetic.extract import extract
from jlora._arithmetic.mix import mix
from jlora._arithmetic.spectrum import spectrum
from jlora._cli import adapters
from jlora._leaf import Full
from jlora._plan.plan import table
from jlora.peft import files
from jlora.peft.check import check as check_server
from jlora.peft.config import FILE as CONFIG_FILE
from jlora.peft.match import match as match_values
from jlora.peft.merge import merge as merge_files
from jlora.peft.names import Names, Part
from jlora.peft.order import Order
from jlora.peft.save import save

Progress = Callable[[int, int], None]


def inspect(args: Any, progress: Progress) -> int:
    """Shows ranks, scales, sizes, norms and spectra."""
    found = adapters.read(args.adapter, args.alpha)
    rows = [_row(path, x) for path, x in found.leaves.items()]
    if args.png:
        place = pathlib.Path(args.png).absolute().parent
        if not place.is_dir():
            raise FileNotFoundError(f"there is no directory {place}")
        own = {p: x for p, x in found.leaves.items() if _has_spectrum(x)}
        if not own:
            raise ValueError(
                f"{found.path} has no factors, of which to show a spectrum"
            )
        spectrum(own).plot(args.png)
        print(f"wrote {args.png}")
        return 0
    total = sum(row["parameters"] for row in rows)
    if args.json:
        said = {"format": found.format, "parameters": total, "weights": rows}
        print(json.dumps(said, indent=1))
        return 0
    print(f"{found.path}: {found.format}, {len(rows)} weights, {total:,} parameters")
    head = "weight layer shape rank alpha parameters norm 90%".split()
    print(table(head, [[_cell(row[k]) for k in _COLUMNS] for row in rows]))
    return 0


_COLUMNS = "path", "layer", "shape", "rank", "alpha", "parameters", "norm", "rank_90"


def _has_spectrum(x: Any) -> bool:
    return adapters.is_low_rank(x) and x.m is None


def _row(path: str, x: Any) -> dict[str, Any]:
    """What is shown of one leaf."""
    size = sum(int(np.prod(y.shape)) for y in jax.tree.leaves(_trained(x)))
    out: dict[str, Any] = dict.fromkeys(_COLUMNS)
    out |= {"path": path, "shape": list(x.shape), "parameters": size}
    if isinstance(x, Full):
        return out | {"layer": "whole", "norm": float(jnp.linalg.norm(x.value))}
    out["layer"] = str(x.layer) or "low-rank"
    if x.a is None:
        return out | {"layer": f"{x.rank} rows"}
    scale = np.asarray(x.scale, np.float64)
    alpha = sorted({float(s) * x.rank for s in scale.reshape(-1)})
    out |= {"rank": x.rank, "alpha": alpha[0] if len(alpha) == 1 else alpha}
    if x.m is not None:
        return out | {"layer": f"{out['layer']}, dora"}
    values = spectrum({path: x})
    own = values[path].astype(np.float64)
    norm = math.sqrt(float((own**2).sum()))
    return out | {"norm": norm, "rank_90": values.rank(path, 0.9) if norm else 0}


def _trained(x: Any) -> Any:
    if isinstance(x, Full):
        return x.value
    return [y for y in (x.a, x.b, x.c, x.m) if y is not None]


def _cell(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, list):
        few = len(x) <= 5
        return "×".join(f"{n:g}" for n in x) if few else f"{x[0]:g} to {x[-1]:g}"
    if isinstance(x, float):
        return f"{x:.4g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def convert(args: Any, progress: Progress) -> int:
    """Writes an adapter in another format."""
    found = adapters.read(args.adapter, args.alpha)
    names = Names.load(args.names) if args.names else adapters.stored_names(found.path)
    if args.to == "peft":
        adapters.write_peft(
            found,
            args.out,
            names,
            portable=args.portable,
            head=args.head,
            config={"base_model_name_or_path": args.base, "task_type": args.task},
        )
    elif args.to == "orbax":
        adapters.write_orbax(found, args.out, names)
    else:
        adapters.write_loralib(found, args.out, names)
    print(f"wrote {args.out}")
    return 0


def merge(args: Any, progress: Progress) -> int:
    """Folds a PEFT adapter into its base."""
    changed = merge_files(args.base, args.adapter, args.out, progress=progress)
    print(f"wrote {args.out}: {len(changed)} tensors changed")
    return 0


def combine(args: Any, progress: Progress) -> int:
    """Mixes several adapters into one."""
    found = [adapters.read(path) for path in args.adapters]
    kinds = {x.format for x in found}
    if len(kinds) > 1:
        raise ValueError(
            f"the adapters are {' and '.join(sorted(kinds))}: expected one format. "
            "Convert them first, with jlora convert"
        )
    weights = args.weights or [1.0] * len(found)
    options = {
        k: getattr(args, k) for k in ("rank", "density") if getattr(args, k) is not None
    }
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights}: expected finite numbers")
    mixed = mix([x.leaves for x in found], weights, args.method, **options)
    adapters.write_like(found[0], mixed, args.out)
    print(f"wrote {args.out}: {len(mixed)} weights")
    return 0


def diff(args: Any, progress: Progress) -> int:
    """Compares two adapters, or two bases."""
    bases = [_is_base(path) for path in (args.first, args.second)]
    if all(bases):
        return _diff_bases(args, progress)
    if any(bases):
        raise ValueError("expected two adapters or two bases, found one of each")
    if args.out:
        raise ValueError("--out extracts the difference of two bases, not of adapters")
    one, two = (adapters.read(p).leaves for p in (args.first, args.second))
    rows, far = [], 0.0
    for path in [*one, *(p for p in two if p not in one)]:
        own = _compared(path, one.get(path), two.get(path))
        far = max(far, own["relative"])
        rows.append(own)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        head = "weight", "first", "second", "difference", "relative"
        print(table(head, [[_cell(r[k]) for k in r] for r in rows]))
    return int(far > args.tolerance)


def _compared(path: str, x: Any, y: Any) -> dict[str, Any]:
    """The norms of two deltas and of their difference."""
    norms = [_norm(path, z) for z in (x, y)]
    gap: float | None = None
    if _same(x, y):
        gap = 0.0
    elif x is None or y is None:
        gap = max(norms)
    elif isinstance(x, Full) and isinstance(y, Full):
        gap = float(jnp.linalg.norm(x.value.astype(float) - y.value.astype(float)))
    elif _has_spectrum(x) and _has_spectrum(y):
        gap = _norm(path, mix([{path: x}, {path: y}], [1, -1])[path])
    elif not _alike(x, y):
        gap = math.inf  # one has a magnitude, or other rows
    else:  # a magnitude, or rows: their arrays are compared
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        gap = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    most = max(norms)
    relative = gap / most if most else gap
    if math.isnan(relative):
        relative = math.inf
    keys = ("path", "first", "second", "difference", "relative")
    return dict(zip(keys, (path, *norms, gap, relative), strict=True))


def _same(x: Any, y: Any) -> bool:
    """Whether two leaves are equal, number by number."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False)
    return _alike(x, y) and all(bool((a == b).all()) for a, b in pairs)


def _alike(x: Any, y: Any) -> bool:
    """Whether two leaves have the same fields, of the same shapes."""
    return _shapes(x) == _shapes(y) and str(x) == str(y)


def _shapes(x: Any) -> list[Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(x)
    return [(jax.tree_util.keystr(keys), a.shape) for keys, a in pairs]


def _norm(path: str, x: Any) -> float:
    if x is None:
        return 0.0
    if _has_spectrum(x):
        own = spectrum({path: x})[path].astype(np.float64)
        return math.sqrt(float((own**2).sum()))
    arrays = jax.tree.leaves(_trained(x))
    return math.sqrt(sum(float((y.astype(jnp.float32) ** 2).sum()) for y in arrays))


def _is_base(path: str) -> bool:
    place = pathlib.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is no {path}")
    if place.is_dir():
        has = any(p.suffix == ".safetensors" for p in place.iterdir())
        return has and not (place / CONFIG_FILE).exists()
    return place.suffix == ".safetensors" and not any(
        "lora_" in name for name in files.tensors(place)
    )


def _diff_bases(args: Any, progress: Progress) -> int:
    one, two = files.tensors(args.first), files.tensors(args.second)
    both = [n for n in one if n in two and one.shape(n) == two.shape(n)]
    others = sorted({*one, *two} - {*both})
    total, done = sum(math.prod(one.shape(n)) for n in both), 0
    rows, leaves = [], {}
    for name in both:
        done += math.prod(one.shape(name))
        progress(done, total)
        own = _compared_tensors(name, one, two)
        if own is None:
            continue
        rows.append(own)
        if args.out and len(own["shape"]) == 2 and name.endswith(".weight"):
            x, y = (t.read(name).astype(np.float32) for t in (one, two))
            tree = extract({"w": x.T}, {"w": y.T}, rank=args.rank, targets="w")
            leaves[name] = tree["w"]
    far = max((row["relative"] for row in rows), default=0.0)
    if args.json:
        print(json.dumps({"tensors": rows, "only in one": others}, indent=1))
    else:
        if rows:
            cells = [[_cell(x) for x in row.values()] for row in rows]
            print(table(("tensor", "shape", "norm", "difference", "relative"), cells))
        within = f", by at most {far:.3g}" if rows else ""
        print(f"{len(rows)} of {len(both)} tensors differ{within}")
        for name in others:
            print(f"  only in one, or of another shape: {name}")
    if args.out:
        _save_extracted(args.out, leaves, one)
    return int(far > args.tolerance or bool(others))


def _compared_tensors(
    name: str, one: files.Tensors, two: files.Tensors
) -> dict[str, Any] | None:
    """How far a tensor of two bases differs; None if it does not."""
    shape = list(one.shape(name))
    row = {"path": name, "shape": shape, "norm": 0.0}
    if not (one.is_float(name) and two.is_float(name)):
        if one[name][1] == two[name][1] and one.same_bytes(name, two):
            return None
        return row | {"difference": math.inf, "relative": math.inf}
    x, y = (t.read(name).astype(np.float32) for t in (one, two))
    if np.array_equal(x, y):
        return None
    gap, size = float(np.linalg.norm(y - x)), float(np.linalg.norm(x))
    relative = gap / size if size else math.inf
    if math.isnan(relative):
        gap = relative = math.inf
    return row | {"norm": size, "difference": gap, "relative": relative}


def _save_extracted(out: str, leaves: dict[str, Any], base: files.Tensors) -> None:
    """Saves the difference of two bases as a PEFT adapter."""
    if not leaves:
        raise ValueError("no matrix differs: there is nothing to extract")
    found, shapes = {}, {}
    for name in leaves:
        columns, rows = shapes[name] = base.shape(name)
        own = (Order.all(rows), Order.all(columns)) * 2
        found[name] = (Part(name, "oi", "io", "dense", (), (), *own),)
    save(out, leaves, names=Names(found, tensors=shapes))
    print(f"wrote {out}: {len(leaves)} matrices")


def match(args: Any, progress: Progress) -> int:
    """Finds which weight is which tensor."""
    params = _params(args.params)
    names = match_values(params, args.base, progress=progress)
    print(names)
    if args.out:
        names.save(args.out)
        print(f"wrote {args.out}")
    lost = [p for p in names.missing if len(names.base[p][0]) > 1]
    return int(bool(lost) or not names.found)


def _params(said: str) -> Any:
    """Params from a Flax checkpoint, or from ``module:attribute``."""
    path = pathlib.Path(said).expanduser()
    if path.exists():
        return _restored(path)
    name, colon, attribute = said.partition(":")
    if not (colon and attribute and name.replace(".", "").replace("_", "").isalnum()):
        raise FileNotFoundError(
            f"there is no {said}: expected a checkpoint of Flax, or module:attribute"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
        for key in attribute.split("."):
            found = getattr(found, key)
        return found() if inspect_module.isroutine(found) else found
    except (Exception, SystemExit) as e:
        raise ValueError(f"{said} gives no params ({type(e).__name__}: {e})") from None


def _restored(path: pathlib.Path) -> Any:
    """The params of a Flax checkpoint: Orbax's directory, or a file of msgpack."""
    for file, what in ((CONFIG_FILE, "an adapter"), ("document", "jlora's checkpoint")):
        if (path / file).exists():
            raise ValueError(f"{path} is {what}: expected the params of a model")
    try:
        if path.is_dir():
            with ocp.StandardCheckpointer() as checkpointer:
                return _without_values(checkpointer.restore(path.absolute()))
        return _without_values(flax.serialization.msgpack_restore(path.read_bytes()))
    except Exception as e:
        files.refuse(path, f"it is no checkpoint of Flax ({str(e).splitlines()[0]})")


def _without_values(tree: Any) -> Any:
    """A tree in which NNX's variables, saved as {"value": array}, are their arrays."""
    if not isinstance(tree, dict):
        return tree
    if [*tree] == ["value"]:
        return tree["value"]
    return {key: _without_values(x) for key, x in tree.items()}


def check(args: Any, progress: Progress) -> int:
    """Says what a server would refuse or ignore."""
    report = check_server(args.adapter, args.server)
    print(report)
    return int(not report.ok)
