import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jlora
import jlora.checkpoint


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))
        return nn.Dense(3, name="head")(x)


net, x, y = Net(), jnp.ones((8, 32)), jnp.zeros(8, int)
params = net.init(jax.random.key(0), x)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
# the lines
lora = jlora.wrap(
    params,
    rank=8,
    alpha=16,
    targets=["**/up/kernel", "**/down/kernel"],
    train="**/head/*",
)
print(jlora.summary(lora))
apply = jlora.lift(net.apply)
tx = jlora.optimizer(optax.adamw(1e-3), lora)
state = TrainState.create(apply_fn=apply, params=lora, tx=tx)


@jax.jit
def train_step(state, key):
    def loss(tree):
        tree = jlora.dropout(tree, 0.1, key)
        return cross_entropy(apply(tree, x), y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for step in range(3):
    state = train_step(state, jax.random.key(step))

jlora.checkpoint.save("adapter", state.params)
restored = jlora.checkpoint.restore("adapter", params)
merged = jlora.merge(state.params)
