import jax.numpy as jnp
import optax
from flax import nnx

import jlora


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


net, x = Net(nnx.Rngs(0)), jnp.ones((8, 32))
# the lines
model = jlora.wrap(net, rank=8, alpha=16, targets=["up/kernel", "down/kernel"])
call = jlora.lift(lambda model, x: model(x))
tx = jlora.optimizer(optax.adamw(1e-3), model)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x):
    def loss(model):
        return (call(model, x) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


for _ in range(3):
    print(train_step(model, optimizer, x))

adapter = jlora.adapter(model)
merged = jlora.merge(model)  # a plain module
