"""What each command does.  Each returns the exit code: 0, or 1 for found wanting."""

from __future__ import annotations

import importlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
            found, args.out, names, portable=args.portable, head=args.head
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
    if x is None or y is None:
        gap = max(norms)
    elif isinstance(x, Full) and isinstance(y, Full):
        gap = float(jnp.linalg.norm(x.value.astype(float) - y.value.astype(float)))
    elif _has_spectrum(x) and _has_spectrum(y):
        gap = _norm(path, mix([{path: x}, {path: y}], [1, -1])[path])
    else:  # a magnitude, or rows: their arrays are compared
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        gap = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    most = max(norms)
    relative = gap / most if most else 0.0
    keys = ("path", "first", "second", "difference", "relative")
    return dict(zip(keys, (path, *norms, gap, relative), strict=True))


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
    rows, leaves, far = [], {}, 0.0
    both = [n for n in one if n in two]
    others = sorted({*one} ^ {*two})
    total = sum(math.prod(one.shape(n)) for n in both)
    done = 0
    for name in both:
        done += math.prod(one.shape(name))
        progress(done, total)
        if one.shape(name) != two.shape(name):
            others.append(name)
            continue
        if not (one.is_float(name) and two.is_float(name)):
            continue
        x, y = (t.read(name).astype(np.float32) for t in (one, two))
        gap, size = float(np.linalg.norm(y - x)), float(np.linalg.norm(x))
        if gap == 0:
            continue
        far = max(far, gap / size if size else math.inf)
        rows.append(
            (
                name,
                _cell(list(x.shape)),
                f"{size:.4g}",
                f"{gap:.4g}",
                f"{gap / size if size else math.inf:.3g}",
            )
        )
        if args.out and x.ndim == 2 and name.endswith(".weight"):
            own = extract({"w": x.T}, {"w": y.T}, rank=args.rank, targets="w")
            leaves[name] = own["w"]
    if rows:
        print(table(("tensor", "shape", "norm", "difference", "relative"), rows))
    print(f"{len(rows)} of {len(both)} tensors differ")
    for name in others:
        print(f"  only in one, or of another shape: {name}")
    if args.out:
        _save_extracted(args.out, leaves, one)
    return int(far > args.tolerance or bool(others))


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
    return int(bool(names.missing))


def _params(said: str) -> Any:
    """Params from a Flax checkpoint, or from ``module:attribute``."""
    path = pathlib.Path(said)
    if path.is_dir():
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute())
    if path.is_file():
        import flax.serialization

        return flax.serialization.msgpack_restore(path.read_bytes())
    name, colon, attribute = said.partition(":")
    if not colon:
        raise FileNotFoundError(
            f"there is no {said}: expected a checkpoint of Flax, or module:attribute"
        )
    sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(name)
    for key in attribute.split("."):
        found = getattr(found, key)
    return found() if callable(found) else found


def check(args: Any, progress: Progress) -> int:
    """Says what a server would refuse or ignore."""
    report = check_server(args.adapter, args.server)
    print(report)
    return int(not report.ok)
