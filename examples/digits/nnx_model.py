"""LoRA on a Flax NNX module, with the object API.

    python examples/digits/nnx_model.py

A recurrent network, which reads a digit row by row, learns 0 to 4; factors of rank 4 on
its matrices, and its head, then learn 5 to 9.
"""

import jax
import numpy as np
import optax
from digits import NEW, OLD, batches, load
from flax import nnx

import jlora


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inputs = nnx.Linear(8, 64, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(64, 64, rngs=rngs))
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.head(self.rnn(self.inputs(images[..., 0]))[:, -1])


def train(call, model, tx, data, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            logits = call(model, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for batch in batches(data, steps):
        step(model, optimizer, *batch)


def accuracy(call, model, data):
    return float((nnx.jit(call)(model, data[0]).argmax(-1) == data[1]).mean())


def main():
    old, old_test = load(OLD)
    new, new_test = load(NEW)

    def call(model, images):
        return model(images)

    base = Net(nnx.Rngs(0))
    train(call, base, optax.adam(3e-3), old, 150)
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(base, nnx.Param))]

    plan = jlora.plan(call, base, new[0][:1], rank=4, exclude="head/kernel")
    print(plan)
    model = jlora.wrap(base, plan=plan, train="head/*")  # a module beside the base
    lifted = jlora.lift(call)
    train(lifted, model, jlora.optimizer(optax.adam(3e-3), model), new, 150)

    scores = {
        "base on 0 to 4": accuracy(call, base, old_test),
        "base on 5 to 9": accuracy(call, base, new_test),
        "adapted on 5 to 9": accuracy(lifted, model, new_test),
        "merged on 5 to 9": accuracy(call, jlora.merge(model), new_test),
    }
    for name, score in scores.items():
        print(f"{name:20} {score:.3f}")
    assert scores["base on 0 to 4"] > 0.95 and scores["adapted on 5 to 9"] > 0.9
    assert scores["merged on 5 to 9"] == scores["adapted on 5 to 9"]
    after = jax.tree.leaves(nnx.state(jlora.unwrap(model), nnx.Param))
    same = map(np.array_equal, before, after)
    assert all(same), "the base has moved"


if __name__ == "__main__":
    main()
