"""Serves many adapters from one base: each row of a batch decodes with its own.

    python examples/many/serve.py            # minutes on 2 cores
    python examples/many/serve.py --quick    # every step of it in a minute

There are more adapters than slots in the bank, and more requests than rows. A request
waits until a row is free and its adapter is in a slot, or can be put into one that no
row uses, while the others go on decoding. Prompts go through the same compiled step as
what follows them, one token at a time. What each request got is compared, token by
token, with the model that has the request's adapter merged; and the throughput is
measured by the number of distinct adapters in the batch.

Uses the adapters that examples/many/domains.py has trained, if they are there, and as
many of random numbers as it takes.
"""

import argparse
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import charts
import decode
import domains
import jax
import jax.numpy as jnp
import numpy as np
import weights
from tqdm import tqdm

import jlora
import jlora.checkpoint

PROMPTS = ["The film is", "This product", "I just", "The president said"]


@dataclasses.dataclass
class Request:
    """What a client asks for, and what it has got so far."""

    prompt: list[int]
    adapter: str | None
    """None: the base alone."""
    new: int
    said: list[int] = dataclasses.field(default_factory=list)
    at: int = 0
    """How many tokens the model has had."""
    waited: int = 0
    """Steps until a row and a slot were free."""

    def next(self) -> tuple[int, int]:
        """The token that the model gets now, and its position."""
        tokens = self.prompt + self.said
        return tokens[self.at], self.at


class Slots:
    """Which adapter is in which slot of a bank, and which may give way.

    The bank is a fixed number of arrays: an adapter comes in by `jlora.put`, which is
    compiled once.
    """

    def __init__(self, bank: jlora.Bank, load: Callable[[str], Any]):
        self.bank, self.load = bank, load
        self.slot_of: dict[str, int] = {}
        self.users: collections.Counter[str] = collections.Counter()
        self.free = list(range(bank.slots))
        self.loaded = 0
        self._put = jax.jit(jlora.put, donate_argnums=0)

    def take(self, name: str | None) -> int | None:
        """The slot of an adapter, for one more row; None if all slots are in use."""
        if name is None:
            return -1
        if name not in self.slot_of:
            idle = [x for x in self.slot_of if not self.users[x]]
            if not self.free and not idle:
                return None
            # In the order of last use: the first is the one that gives way.
            slot = self.free[-1] if self.free else self.slot_of[idle[0]]
            # Either may fail; then nothing has changed.
            self.bank = self._put(self.bank, slot, self.load(name))
            if self.free:
                self.free.pop()
            else:
                del self.slot_of[idle[0]]
            self.slot_of[name] = slot
            self.loaded += 1
        self.slot_of[name] = self.slot_of.pop(name)  # the last to be used
        self.users[name] += 1
        return self.slot_of[name]

    def leave(self, name: str | None) -> None:
        if name is not None:
            self.users[name] -= 1


class Server:
    """Rows that decode together, and a queue of what waits for one."""

    def __init__(self, model, slots: Slots, rows: int, length: int, end: int):
        self.model, self.slots, self.length, self.end = model, slots, length, end
        self.rows: list[Request | None] = [None] * rows
        self.ids = np.full(rows, -1, np.int32)
        one = decode.empty(model, length)
        self.cache = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), one)
        self.queue: collections.deque[Request] = collections.deque()
        self.step = compiled_step()

    def ask(self, request: Request) -> None:
        if not request.prompt or request.new < 1:
            raise ValueError(
                f"{len(request.prompt)} tokens of prompt and {request.new} new ones: "
                "expected at least one of each"
            )
        if len(request.prompt) + request.new > self.length:
            raise ValueError(
                f"{len(request.prompt)} tokens of prompt and {request.new} new ones: "
                f"expected at most {self.length} together, which the cache has"
            )
        self.queue.append(request)

    def admit(self) -> None:
        """Gives free rows to what waits; one that lacks a slot lets others pass."""
        for request in list(self.queue):
            if None not in self.rows:
                break
            slot = self.slots.take(request.adapter)
            if slot is None:
                continue
            row = self.rows.index(None)
            self.rows[row], self.ids[row] = request, slot
            # Masked positions count for nothing, unless an adapter left NaN there.
            self.cache = cleared(self.cache, row)
            self.queue.remove(request)
        for request in self.queue:
            request.waited += 1

    def tick(self) -> list[Request]:
        """One token of every row; what has ended."""
        self.admit()
        pairs = [x.next() if x else (0, 0) for x in self.rows]
        tokens, at = np.array(pairs, np.int32).T
        best, self.cache = self.step(
            self.model, self.slots.bank, self.ids, self.cache, tokens, at
        )
        ended = []
        for row, token in enumerate(np.asarray(best).tolist()):
            request = self.rows[row]
            if request is None:
                continue
            request.at += 1
            if request.at < len(request.prompt):
                continue  # the prompt says what comes next
            request.said.append(token)
            if token == self.end or len(request.said) >= request.new:
                ended.append(request)
                self.rows[row], self.ids[row] = None, -1
                self.slots.leave(request.adapter)
        return ended


@partial(jax.jit, donate_argnums=0)
def cleared(cache, row):
    """The caches with an empty one in a row."""
    return jax.tree.map(lambda x: x.at[row].set(0), cache)


def compiled_step(**options):
    """A step of all rows: the likeliest next tokens (rows,), and the caches."""

    def step(model, bank, ids, cache, tokens, at):
        logits, cache = jlora.per_example(decode.step, **options)(
            model, bank, ids, cache, tokens, at
        )
        return logits.argmax(-1), cache

    return jax.jit(step, donate_argnums=3)


@jax.jit
def alone(model, cache, token, at):
    """One row of a model without adapters."""
    logits, cache = decode.step(model, cache, token, at)
    return logits.argmax(-1), cache


def greedy(model, request: Request, length: int, end: int) -> list[int]:
    """What the model says to the request's prompt, token by token."""
    said: list[int] = []
    cache = decode.empty(model, length)
    for at in range(len(request.prompt) + request.new - 1):
        token = (request.prompt + said)[at]
        best, cache = alone(model, cache, jnp.int32(token), jnp.int32(at))
        if at >= len(request.prompt) - 1:
            said.append(int(best))
            if said[-1] == end:
                break
    return said


def serve(server: Server, requests: Sequence[Request]) -> float:
    """Answers all requests; the seconds that it took after the first step."""
    for request in requests:
        server.ask(request)
    left = len(requests)
    began = None
    with tqdm(total=left, unit=" requests", ncols=88) as bar:
        while left:
            ended = server.tick()
            began = began or time.perf_counter()  # the first step compiles
            left -= len(ended)
            busy = sum(x is not None for x in server.rows)
            bar.set_postfix_str(
                f"{busy} rows, {len(server.queue)} wait, {server.slots.loaded} loads"
            )
            bar.update(len(ended))
    return time.perf_counter() - began


REPEATS = 3
"""How often each rate is measured, all of them in turns; the median counts."""


def measured(model, adapters: list[Any], rows: int, steps: int) -> list[dict]:
    """Tokens a second by the number of distinct adapters in a batch of so many rows."""
    one, tokens = decode.empty(model, steps), np.arange(rows, dtype=np.int32) + 100
    mixed = compiled_step()
    base = jax.jit(jax.vmap(alone, (None, 0, 0, 0)), donate_argnums=1)

    def empty(n: int):
        return jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), one)

    def seconds(calls) -> float:
        """Of some steps of all rows, a part of which is in each of the calls."""
        states = [empty(n) for _, n in calls]
        began = time.perf_counter()
        for at in range(steps):
            for k, (call, n) in enumerate(calls):
                where = np.full(n, at, np.int32)
                out, states[k] = call(states[k], tokens[:n], where)
            jax.block_until_ready(out)
        return time.perf_counter() - began

    found: list[dict] = []
    ways = {"base": [(partial(base, model), rows)]}
    for distinct in (2**k for k in range(rows.bit_length())):
        if distinct > len(adapters) or rows % distinct:
            break
        bank, ids = jlora.stack(adapters[:distinct]), np.arange(rows) % distinct
        ways[f"mixed {distinct}"] = [(_with(mixed, model, bank, ids), rows)]
        each = rows // distinct
        ways[f"apart {distinct}"] = [
            (_with(mixed, model, jlora.stack([x]), np.zeros(each, int)), each)
            for x in adapters[:distinct]
        ]
        args = model, bank, ids, empty(rows), tokens, tokens
        report = jlora.explain(jlora.per_example(decode.step), *args)
        found.append({"distinct": distinct, "product": report.product})
    taken: dict[str, list[float]] = {name: [] for name in ways}
    # The first time it compiles.
    for name in tqdm([*ways] * (1 + REPEATS), desc="measuring", ncols=88, leave=False):
        taken[name].append(seconds(ways[name]))
    rate = {k: rows * steps / float(np.median(x[1:])) for k, x in taken.items()}
    for row in found:
        row["base"] = rate["base"]
        for name in ("mixed", "apart"):
            row[name] = rate[f"{name} {row['distinct']}"]
    return found


def _with(step, model, bank, ids):
    return lambda cache, tokens, at: step(model, bank, ids, cache, tokens, at)


class Library:
    """Adapters by name: trained ones from a folder, the others of random numbers."""

    def __init__(self, model, folder: Path, count: int, config: domains.Config):
        self.model, self.config = model, config
        trained = [x for x in sorted(folder.glob("*")) if x.is_dir()]
        self.folders = {path.name: path for path in trained[:count]}
        missing = range(count - len(self.folders))
        self.names = [*self.folders, *(f"random {k}" for k in missing)]
        self.like = domains.wrapped(model, config, 0)

    def __call__(self, name: str) -> Any:
        if name in self.folders:
            tree = jlora.checkpoint.restore(self.folders[name], self.model)
            return jlora.adapter(tree)
        key = jax.random.key(self.names.index(name))

        def filled(x: Any) -> Any:
            b = jax.random.normal(key, x.b.shape, x.b.dtype) / 20
            return dataclasses.replace(x, b=b)

        return {path: filled(x) for path, x in jlora.adapter(self.like).items()}


def main() -> None:
    args = arguments()
    # Of two tokens that are nearly as likely, all products have to prefer the same.
    jax.config.update("jax_default_matmul_precision", "highest")
    source = weights.load(args.model)
    model = source.model(scanned=True)
    config = domains.Config(1, args.rank, 2.0 * args.rank, 0.0, 1, 8, 0, 0, "", "")
    library = Library(model, args.adapters, args.count, config)
    print(f"{len(library.names)} adapters: {', '.join(library.names)}")
    adapters = {name: library(name) for name in library.names}
    # With room for each of them: the highest rank, and every path.
    like = jlora.stack(list(adapters.values()))
    bank = jax.tree.map(lambda x: jnp.repeat(x[:1], args.slots, axis=0), like)
    length = args.new + 16
    server = Server(model, Slots(bank, library), args.rows, length, source.end)

    def request(k: int) -> Request:
        # Each asks an adapter of its own; every seventh the base.
        name = None if k % 7 == 6 else library.names[k % len(library.names)]
        text = PROMPTS[k % len(PROMPTS)]
        prompt = source.tokenizer.encode(text, add_special_tokens=False).ids
        return Request([source.end, *prompt], name, max(1, args.new - k % 5))

    requests = [request(k) for k in range(args.requests)]
    seconds = serve(server, requests)
    tokens = sum(x.at for x in requests)
    print(
        f"{args.requests} requests with {args.rows} rows and {args.slots} slots: "
        f"{tokens} tokens in {seconds:.1f} s, {server.slots.loaded} adapters loaded"
    )
    check(model, requests, adapters, length, source)
    rows = measured(model, list(adapters.values()), args.rows, args.steps)
    print("\ntokens a second with a batch of", args.rows)
    print("distinct    base alone        mixed   one by one   product")
    for row in rows:
        rates = "".join(f"{row[name]:13.1f}" for name in ("base", "mixed", "apart"))
        print(f"{row['distinct']:8} {rates}   {row['product']}")
    charts.throughput(rows, args.rows, args.out / "throughput.png")
    print(f"picture: {args.out / 'throughput.png'}")
    last = rows[-1]
    print(
        f"RESULT requests={args.requests} loads={server.slots.loaded} equal=1"
        f" distinct={last['distinct']} over_base={last['mixed'] / last['base']:.2f}"
        f" over_one_by_one={last['mixed'] / last['apart']:.2f}"
    )


def check(model, requests, adapters, length: int, source) -> None:
    """Each answer against the model with the adapter merged, alone in its batch."""
    shown: set[str | None] = set()
    different, own = 0, {}
    merged: dict[str | None, Any] = {None: model}
    order = sorted(requests, key=lambda x: str(x.adapter))
    for request in tqdm(order, desc="each alone", unit=" requests", ncols=88):
        if request.adapter not in merged:
            tree = jlora.attach(model, adapters[request.adapter])
            merged = {None: model, request.adapter: jlora.merge(tree)}
        want = greedy(merged[request.adapter], request, length, source.end)
        if request.said != want:
            raise SystemExit(
                f"{request.adapter}: {request.said} in the batch, {want} alone"
            )
        if (prompt := tuple(request.prompt)) not in own:
            longest = dataclasses.replace(request, new=max(x.new for x in requests))
            own[prompt] = greedy(model, longest, length, source.end)
        different += want != own[prompt][: request.new]
        if request.adapter not in shown:
            shown.add(request.adapter)
            texts = (source.tokenizer.decode(x) for x in (request.prompt[1:], want))
            tqdm.write("  {:12} {}|{}".format(request.adapter or "base", *texts))
    print(
        f"{len(requests)} answers equal those of each adapter alone, token by token; "
        f"{different} of them are not the base's own"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--adapters", type=Path, help="a folder of them (runs/domains/adapters)")
    add("--count", type=int, default=16, help="adapters, of random numbers if need be")
    add("--slots", type=int, default=6, help="of the bank")
    add("--rows", type=int, default=16, help="that decode together")
    add("--requests", type=int, default=40)
    add("--new", type=int, default=16, help="tokens of an answer")
    add("--steps", type=int, default=8, help="of each measurement")
    add("--rank", type=int, default=8)
    add("--out", type=Path, default=Path("runs/serve"))
    add("--model", type=Path, help="your own Llama: a GGUF file or a snapshot's folder")
    add("--quick", action="store_true", help="a few requests")
    args = parser.parse_args()
    for name in ("count", "slots", "rows", "requests", "new", "steps", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.adapters and not args.adapters.is_dir():
        parser.error(f"--adapters: {args.adapters} is no folder")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file; expected a folder")
    if args.quick:
        args.count, args.slots, args.rows, args.requests = 4, 2, 4, 8
        args.new, args.steps = 6, 2
    trained = Path("runs/domains-quick" if args.quick else "runs/domains")
    args.adapters = args.adapters or trained / "adapters"
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
