import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import jlora
import jlora.loralib


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))


net, x = Net(), jnp.ones((8, 32))
params = net.init(jax.random.key(0), x)["params"]
rng = np.random.default_rng(0)
sizes = {"up": (32, 64), "down": (64, 3)}
safetensors.numpy.save_file(  # as a loralib program with r = 8 saves them
    {
        f"{name}.lora_{which}": rng.normal(size=shape).astype(np.float32)
        for name, (n, m) in sizes.items()
        for which, shape in {"A": (8, n), "B": (m, 8)}.items()
    },
    "adapter.safetensors",
)
# the lines
# adapter.pt as torch.save wrote it, or a safetensors file
adapter = jlora.loralib.load("adapter.safetensors", params, alpha=16)
lora = jlora.attach(params, adapter)
print(jlora.summary(lora))

y = jlora.lift(net.apply)({"params": lora}, x)
merged = jlora.merge(lora)
