"""The parser, and what all commands share: exit codes, errors, progress."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

CODES = """exit codes: 0 done; 1 found wanting (a check, a difference, a damaged file);
2 wrong use; 130 stopped by Ctrl-C, with nothing half-written"""
SERVERS = "vllm", "sglang", "tensorrt-llm", "transformers"
METHODS = (
    "cat linear svd ties dare_linear dare_ties magnitude_prune ties_svd "
    "dare_linear_svd dare_ties_svd magnitude_prune_svd"
).split()


def _version() -> str:
    return str(importlib.import_module("jlora").__version__)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    out = argparse.ArgumentParser(
        "jlora",
        description="Low-rank adapters on disk: PEFT's, jlora's (Orbax) and loralib's.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--version", action="version", version=f"jlora {_version()}")
    commands = out.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog=f"example:\n  {example}\n\n{CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _inspect(command)
    _convert(command)
    _merge(command)
    _combine(command)
    _diff(command)
    _match(command)
    _check(command)
    return out


def _inspect(command: Any) -> None:
    p = command(
        "inspect",
        "show ranks, alphas, sizes, norms and spectra of an adapter",
        "jlora inspect adapter/ --png spectrum.png",
    )
    p.add_argument("adapter", help="a PEFT directory, a checkpoint, or a loralib file")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--png", metavar="FILE", help="a picture of the spectra instead")
    p.add_argument("--alpha", type=float, help="lora_alpha of a loralib file")


def _convert(command: Any) -> None:
    p = command(
        "convert",
        "write an adapter in another format",
        "jlora convert checkpoint/ adapter/ --to peft --names names.json --portable",
    )
    p.add_argument("adapter", help="a PEFT directory, a checkpoint, or a loralib file")
    p.add_argument("out", help="a new directory, or for loralib a .safetensors file")
    p.add_argument("--to", choices=("peft", "orbax", "loralib"), required=True)
    p.add_argument(
        "--names",
        metavar="FILE",
        help="which weight is which tensor, as match writes it (default: the names "
        "beside a PEFT adapter that jlora saved)",
    )
    p.add_argument(
        "--portable", action="store_true", help="PEFT files that every server takes"
    )
    p.add_argument("--base", help="base_model_name_or_path of the PEFT config")
    p.add_argument("--task", help="task_type of the PEFT config, such as CAUSAL_LM")
    p.add_argument("--head", help="torch's module of a tied head, such as lm_head")
    p.add_argument("--alpha", type=float, help="lora_alpha of a loralib file")


def _merge(command: Any) -> None:
    p = command(
        "merge",
        "fold a PEFT adapter into its base, tensor by tensor",
        "jlora merge base/ adapter/ merged/",
    )
    p.add_argument("base", help="a safetensors file, or a folder of shards")
    p.add_argument("adapter", help="a PEFT directory")
    p.add_argument("out", help="a new file or folder, as the base is")


def _combine(command: Any) -> None:
    p = command(
        "combine",
        "mix several adapters into one",
        "jlora combine a/ b/ --weights 0.7 0.3 --method svd --rank 16 --out mixed/",
    )
    p.add_argument("adapters", nargs="+", help="adapters of one format")
    p.add_argument("--weights", nargs="+", type=float, help="one for each; default 1")
    p.add_argument("--method", choices=METHODS, default="cat", help="default: cat")
    p.add_argument("--rank", type=int, help="for the methods with svd")
    p.add_argument("--density", type=float, help="for ties, dare and magnitude_prune")
    p.add_argument("--out", required=True, help="a new directory")


def _tolerance(text: str) -> float:
    x = float(text)
    if not x >= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number, zero or more")
    return x


def _diff(command: Any) -> None:
    p = command(
        "diff",
        "compare two adapters, or two bases; of these, extract an adapter",
        "jlora diff base/ tuned/ --rank 16 --out extracted/",
    )
    p.add_argument("first", help="an adapter, or a base as safetensors")
    p.add_argument("second", help="another of its kind")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-6,
        help="the largest relative difference that counts as none; default 1e-6",
    )
    p.add_argument("--out", help="write the difference of two bases as an adapter")
    p.add_argument("--rank", type=int, default=16, help="its rank; default 16")


def _match(command: Any) -> None:
    p = command(
        "match",
        "find which weight of a JAX model is which tensor of a checkpoint",
        "jlora match flax_checkpoint/ base/ --out names.json",
    )
    p.add_argument(
        "params",
        help="a Flax checkpoint (Orbax or msgpack), or module:attribute of the params "
        "or of a function that gives them",
    )
    p.add_argument("base", nargs="+", help="safetensors files, or a folder of shards")
    p.add_argument("--out", metavar="FILE", help="save the names as JSON")


def _check(command: Any) -> None:
    p = command(
        "check",
        "say what a server would refuse of an adapter, or silently ignore",
        "jlora check adapter/ --server vllm",
    )
    p.add_argument("adapter", help="a PEFT directory")
    p.add_argument("--server", choices=SERVERS, required=True)


class _Bar:
    """A line of progress on a terminal, after the first second."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._start < 1 or (now - self._last < 0.2 and done < total):
            return
        self._last, part = now, done / max(total, 1)
        left = (now - self._start) * (1 - part) / max(part, 1e-9)
        filled = int(24 * part)
        line = (
            f"\r[{'#' * filled}{'.' * (24 - filled)}] {part:4.0%}, {left:.0f} s left "
        )
        if sys.stderr.isatty():
            print(line, end="", file=sys.stderr, flush=True)
            self._shown = True

    def close(self) -> None:
        """Ends the line, if one was shown."""
        if self._shown:
            print("\r" + " " * 50 + "\r", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit code."""
    args = parser().parse_args(argv)
    bar = _Bar()
    try:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from jlora._cli import commands

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _say
            return getattr(commands, args.command)(args, bar)
    except KeyboardInterrupt:
        bar.close()
        print("jlora: stopped; nothing was half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:  # one sentence for all: a traceback helps no user
        bar.close()
        print(f"jlora {args.command}: {_sentence(e)}", file=sys.stderr)
        return _code(e)
    finally:
        bar.close()


def _sentence(e: Exception) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, OSError) and e.strerror and e.filename:
        text = f"{e.filename}: {e.strerror}"
    if not isinstance(e, (OSError, ValueError, TypeError)):
        text = f"{type(e).__name__}: {text}"
    text = re.sub(r"^(?:peft\.)?\w+(?:\.\w+)?: ", "", text)  # the function's name
    return text if text.endswith((".", "!")) else text + "."


def _code(e: Exception) -> int:
    """1 for a file that is not whole, 2 for wrong use."""
    from jlora.checkpoint import DamagedError
    from jlora.peft import FormatError

    return 1 if isinstance(e, (FormatError, DamagedError)) else 2


def _say(message: Any, *_: Any, **__: Any) -> None:
    print(f"jlora: {message}", file=sys.stderr)
