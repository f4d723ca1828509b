"""LoRA on a plain function of a dict of arrays: no framework, no TrainState.

    python examples/digits/plain.py

A small network learns the digits 0 to 4; factors of rank 4 on its two hidden matrices,
and its head, then learn 5 to 9. The base comes out of it in the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import NEW, OLD, batches, load

import jlora


def init(key):
    sizes = {"first": (64, 128), "second": (128, 128), "head": (128, 10)}
    keys = jax.random.split(key, len(sizes))
    normal = jax.nn.initializers.he_normal()
    return {
        name: {"w": normal(k, shape), "b": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def model(params, images):
    x = images.reshape(len(images), -1)
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]


def loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(apply, params, data):
    return float((jax.jit(apply)(params, data[0]).argmax(-1) == data[1]).mean())


def pretrain(params, data):
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: loss(model(p, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches(data, steps=200):
        params, state = step(params, state, *batch)
    return params


def main():
    old, old_test = load(OLD)
    new, new_test = load(NEW)
    base = pretrain(init(jax.random.key(0)), old)
    before = jax.tree.map(np.asarray, base)

    plan = jlora.plan(model, base, new[0][:1], rank=4, exclude="head/w")
    print(plan)
    tree = jlora.wrap(base, plan=plan, train="head/*")
    apply = jlora.lift(model)
    trainable, frozen = jlora.partition(tree)
    tx = optax.adam(3e-3)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state, x, y):
        def batch_loss(trainable):
            return loss(apply(jlora.combine(trainable, frozen), x), y)

        value, grads = jax.value_and_grad(batch_loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    for batch in batches(new, steps=200):
        trainable, state, value = step(trainable, state, *batch)
    tree = jlora.combine(trainable, frozen)

    scores = {
        "base on 0 to 4": accuracy(model, base, old_test),
        "base on 5 to 9": accuracy(model, base, new_test),
        "adapted on 5 to 9": accuracy(apply, tree, new_test),
        "merged on 5 to 9": accuracy(model, jlora.merge(tree), new_test),
    }
    for name, score in scores.items():
        print(f"{name:20} {score:.3f}")
    assert scores["base on 0 to 4"] > 0.95 and scores["adapted on 5 to 9"] > 0.9
    assert scores["merged on 5 to 9"] == scores["adapted on 5 to 9"]
    same = jax.tree.map(np.array_equal, before, jlora.unwrap(tree))
    assert jax.tree.all(same), "the base has moved"


if __name__ == "__main__":
    main()
