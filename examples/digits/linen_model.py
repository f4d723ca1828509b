"""LoRA on a Flax Linen convolutional network, with a TrainState.

    python examples/digits/linen_model.py

A network learns the digits 0 to 4; factors of rank 4 on its convolutions, and its head,
then learn 5 to 9. BatchNorm's statistics come back through `mutable`, as ever.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from digits import NEW, OLD, batches, load
from flax.training.train_state import TrainState

import jlora


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


class State(TrainState):
    batch_stats: dict


@jax.jit
def train_step(state, x, y):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return value, new["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats)


def train(apply, params, stats, tx, data, steps):
    state = State.create(apply_fn=apply, params=params, tx=tx, batch_stats=stats)
    for batch in batches(data, steps):
        state = train_step(state, *batch)
    return state


def accuracy(apply, params, stats, data):
    logits = jax.jit(apply)({"params": params, "batch_stats": stats}, data[0])
    return float((logits.argmax(-1) == data[1]).mean())


def main():
    old, old_test = load(OLD)
    new, new_test = load(NEW)
    model = Net()
    variables = model.init(jax.random.key(0), new[0][:1])
    params, stats = variables["params"], variables["batch_stats"]
    base = train(model.apply, params, stats, optax.adam(1e-2), old, 150)

    # The parameters are planned as they are wrapped, and watched where they are used.
    def model_fn(params, x):
        return model.apply({"params": params, "batch_stats": stats}, x)

    plan = jlora.plan(model_fn, base.params, new[0][:1], rank=4, exclude="head/kernel")
    print(plan)
    tree = jlora.wrap(base.params, plan=plan, train=["head/*", "**/scale", "**/bias"])
    apply = jlora.lift(model.apply)
    tx = jlora.optimizer(optax.adam(1e-2), tree)
    state = train(apply, tree, base.batch_stats, tx, new, 150)

    merged = jlora.merge(state.params)
    scores = {
        "base on 0 to 4": accuracy(
            model.apply, base.params, base.batch_stats, old_test
        ),
        "base on 5 to 9": accuracy(
            model.apply, base.params, base.batch_stats, new_test
        ),
        "adapted on 5 to 9": accuracy(apply, state.params, state.batch_stats, new_test),
        "merged on 5 to 9": accuracy(model.apply, merged, state.batch_stats, new_test),
    }
    for name, score in scores.items():
        print(f"{name:20} {score:.3f}")
    assert scores["base on 0 to 4"] > 0.95 and scores["adapted on 5 to 9"] > 0.9
    assert scores["merged on 5 to 9"] == scores["adapted on 5 to 9"]
    same = jax.tree.map(np.array_equal, base.params, jlora.unwrap(state.params))
    assert jax.tree.all(same), "the base has moved"


if __name__ == "__main__":
    main()
