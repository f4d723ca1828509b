"""Uses a finished run: restores its adapter onto the pretrained encoder and predicts.

    python examples/minilm/predict.py runs/minilm/seed0 "A joyless, airless film."

`main.py` runs it too, in a fresh process, to check what it saved.
"""

import argparse
import json
from pathlib import Path

import encoder
import jax
import numpy as np
from sentences import Tokens, snapshot
from training import logits

import jlora
import jlora.checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of one seed's run")
    parser.add_argument("texts", nargs="*", help="sentences")
    parser.add_argument("--file", type=Path, help="more sentences, one a line")
    parser.add_argument("--model", type=Path, help="a Hugging Face BERT snapshot")
    parser.add_argument("--logits", type=Path, help="write the logits here (.npy)")
    args = parser.parse_args()

    texts = args.texts
    if args.file:
        lines = args.file.read_text(encoding="utf-8").split("\n")
        texts = texts + [line for line in lines if line.strip()]
    if not texts:
        parser.error("name at least one sentence, or a --file of them")
    config = json.loads((args.run / "config.json").read_text())
    classes = config["classes"]
    base = snapshot(args.model)
    if encoder.digest(base) != config["weights"]:
        raise SystemExit(f"{base}: not the weights that {args.run} was trained on")

    key = jax.random.key(config["seed"])
    model, params = encoder.load(base, len(classes), key)
    tree = jlora.checkpoint.restore(args.run / "adapter", params)
    apply = jax.jit(jlora.lift(model.apply))
    tokens = Tokens.encode(texts, base, config["widths"])
    scores = logits(apply, tree, tokens, np.arange(len(texts)))

    if args.logits:
        np.save(args.logits, scores)
        return
    for text, row in zip(texts, np.asarray(jax.nn.softmax(scores)), strict=True):
        print(f"{classes[row.argmax()]} {row.max():.2f}  {text}")


if __name__ == "__main__":
    main()
