"""What fading costs: FLOPs of a training step of 3L against one of plain LoRA.

    python benchmarks/fade_cost.py

As XLA counts them when it compiles for this machine. Normals are drawn once a weight,
so noise costs the less, the more tokens a step has. Asserts what the docs claim.
"""

import jax
import jax.numpy as jnp

import jlora

LAYERS, WIDTH, RANK = 4, 256, 8


def model(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def flops(tokens: int, fade) -> tuple[float, int]:
    """Of a step, and how many products its program has."""
    array = jax.ShapeDtypeStruct
    layer = {"kernel": array((WIDTH, WIDTH), jnp.float32)}
    layer["bias"] = array((WIDTH,), jnp.float32)
    params = {f"layer_{i}": layer for i in range(LAYERS)}
    trainable, frozen = jlora.partition(jlora.wrap(params, rank=RANK, lora_bias=True))

    def loss(trainable, frozen, x, factor, noise, key):
        tree = fade(jlora.combine(trainable, frozen), factor, noise, key)
        return (jlora.lift(model)(tree, x) ** 2).mean()

    scalar = array((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = array((tokens, WIDTH), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss))
    compiled = step.lower(trainable, frozen, x, scalar, scalar, key).compile()
    return compiled.cost_analysis()["flops"], compiled.as_text().count(" dot(")


def main() -> None:
    fades = {
        "plain LoRA": lambda tree, factor, noise, key: tree,
        "decay": lambda tree, factor, noise, key: jlora.fade(tree, factor),
        "decay + noise": lambda tree, factor, noise, key: jlora.fade(
            tree, factor, noise=noise, key=key
        ),
    }
    print(f"{LAYERS} layers of width {WIDTH}, rank {RANK}: FLOPs of a step, products")
    for tokens in (128, 1024, 8192):
        found = {name: flops(tokens, fade) for name, fade in fades.items()}
        plain, dots = found["plain LoRA"]
        for name, (n, products) in found.items():
            print(f"{tokens:6,} tokens  {name:14} {n / plain:.4f} × plain, {products}")
            assert products == dots
            assert tokens < 1024 or n <= 1.05 * plain


if __name__ == "__main__":
    main()
