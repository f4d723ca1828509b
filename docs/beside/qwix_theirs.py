import jax.numpy as jnp
import optax
import qwix
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


net, x = Net(nnx.Rngs(0)), jnp.ones((8, 32))
# the lines
provider = qwix.LoraProvider(module_path="up|down", rank=8, alpha=16)
model = qwix.apply_lora_to_model(net, provider, x, rngs=nnx.Rngs(1))
optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)


@nnx.jit
def train_step(model, optimizer, x):
    def loss(model):
        return (model(x) ** 2).mean()

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
    optimizer.update(model, grads)
    return value


for _ in range(3):
    print(train_step(model, optimizer, x))

adapter = nnx.state(model, nnx.LoRAParam)
