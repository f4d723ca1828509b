"""What people who came from the README alone ran into."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import says

import jlora
import jlora.checkpoint
import jlora.linen


@pytest.mark.parametrize("deterministic", [True, False])
def test_embed_takes_dropout_in_its_constructor(deterministic):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = jlora.linen.Embed(
                5, 4, rank=2, dropout_rate=0.5, deterministic=deterministic
            )
            return embed.attend(embed(ids))

    ids = jnp.arange(3)
    variables = Tied().init(jax.random.key(0), ids)
    leaf = variables["lora"]["Embed_0"]["embedding"]
    variables["lora"]["Embed_0"]["embedding"] = jax.tree.map(lambda x: x + 1, leaf)
    first, second = (
        Tied().apply(variables, ids, rngs={"dropout": jax.random.key(k)})
        for k in (1, 2)
    )
    assert bool((first == second).all()) is deterministic


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, name="head")(nn.Dense(4, name="body")(x))


@pytest.mark.parametrize(
    "argument", [{"train": "**/head/*"}, {"train": ["**/head/*"]}, {"bias": "all"}]
)
def test_plan_does_not_pass_on_what_belongs_to_wrap(argument):
    x = jnp.ones((2, 3))
    params = Net().init(jax.random.key(0), x)
    with pytest.raises(TypeError) as error:
        jlora.plan(Net().apply, params, x, **argument)
    says(error, next(iter(argument)), "jlora.wrap")
    assert jlora.plan(Net().apply, params, x, train=True)  # the model's own argument


def test_linen_variables_are_pointed_to_linen_adapter():
    layer, x = jlora.linen.Dense(4, rank=2), jnp.ones((2, 3))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError) as error:
        jlora.merge(variables)
    says(error, "jlora.linen.adapter")
    with pytest.raises(ValueError) as error:
        jlora.attach(variables, jlora.linen.adapter(variables))
    says(error, "lora/kernel", "variables['params']")


def test_a_number_stands_for_a_scalar_array_in_extra(tmp_path):
    params = {"kernel": jnp.ones((3, 4))}
    tree = jlora.wrap(params, rank=2)
    extra = {"step": jnp.int32(7), "loss": jnp.float32(0.5)}
    jlora.checkpoint.save(tmp_path / "a", tree, extra=extra)
    _, got = jlora.checkpoint.restore(
        tmp_path / "a", params, extra={"step": 0, "loss": 0.0}
    )
    assert got == {"step": 7, "loss": 0.5}
    assert [type(got[k]) for k in ("step", "loss")] == [int, float]
