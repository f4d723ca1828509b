"""Schedules for `jlora.fade`, in optax's form: step -> value.

The factor of 3L stays at one for some steps, falls linearly, and stays at zero for the
last steps.  The noise follows the factor.  It compensates for what has faded until the
end; or it stops earlier, so that the last steps train the model that will be left.

    factor, noise = jlora.schedules.setting("clear", steps=1000)

    def loss(trainable, frozen, step, key):
        tree = jlora.combine(trainable, frozen)
        tree = jlora.fade(tree, factor(step), noise=noise(step), key=key)
        ...
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax.numpy as jnp
import optax


class Setting(NamedTuple):
    """The two schedules of a run, both from step to a value.

    Attributes:
      factor: the factor of the base, an argument of `jlora.fade`.
      noise: the multiplier of the noise, likewise.
    """

    factor: optax.Schedule
    noise: optax.Schedule


def decay(steps: int, begin: float = 0.1, end: float = 0.9) -> optax.Schedule:
    """The factor: one until ``begin``, then linearly to zero at ``end``.

    Args:
      steps: the number of steps of the whole training.
      begin: where the decay begins, as a fraction of the steps.
      end: where it ends, likewise; the factor is zero for at least the last step.

    Raises:
      ValueError: fractions out of order, a decay that ends after training, or too few
        steps.

    Example:
      >>> import jlora.schedules
      >>> factor = jlora.schedules.decay(100)
      >>> [round(float(factor(step)), 2) for step in (0, 10, 50, 90, 99)]
      [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    steps = operator.index(steps)
    if not 0 <= begin < end:
        raise ValueError(
            f"schedules.decay: begin {begin!r}, end {end!r}: expected fractions of the "
            "steps, 0 <= begin < end."
        )
    first, last = round(begin * steps), round(end * steps)
    if last >= steps:
        raise ValueError(
            f"schedules.decay: the decay ends at step {last}, after the last of "
            f"{steps} (the first is 0): expected the base to be gone by the last step, "
            "which what is left of the model is trained for. Give a smaller end."
        )
    if first == last:
        raise ValueError(
            f"schedules.decay: {steps} steps are too few to decay from {begin:.0%} to "
            f"{end:.0%} of them: expected at least one step between."
        )
    return optax.linear_schedule(1.0, 0.0, last - first, first)


def compensate(factor: optax.Schedule) -> optax.Schedule:
    """The multiplier of the noise: always one, so noise grows as the factor falls.

    Args:
      factor: the schedule of the factor.

    Example:
      >>> import jlora.schedules
      >>> noise = jlora.schedules.compensate(jlora.schedules.decay(100))
      >>> [float(noise(step)) for step in (0, 50, 99)]
      [1.0, 1.0, 1.0]
    """
    return lambda step: jnp.ones_like(factor(step))


def clear(factor: optax.Schedule, below: float = 0.3) -> optax.Schedule:
    """The multiplier of the noise: one, then zero once the factor is below ``below``.

    Args:
      factor: the schedule of the factor.
      below: a number in (0, 1].

    Raises:
      ValueError: another ``below``.

    Example:
      >>> import jlora.schedules
      >>> noise = jlora.schedules.clear(jlora.schedules.decay(100))
      >>> [float(noise(step)) for step in (0, 50, 70, 99)]
      [1.0, 1.0, 0.0, 0.0]
    """
    if not 0 < below <= 1:
        raise ValueError(f"schedules.clear: below {below!r}: expected one in (0, 1].")
    return lambda step: jnp.where(factor(step) < below, 0.0, 1.0)


# Where the decay begins and ends, and the noise from the factor.
_SETTINGS = {
    "decay": (0.1, 0.9, lambda factor: optax.constant_schedule(0.0)),
    "compensate": (0.1, 0.9, compensate),
    "clear": (0.05, 0.85, lambda factor: clear(factor, below=0.2)),
}


def setting(name: str, steps: int) -> Setting:
    """One of the settings that 3L was described with.

    Args:
      name: "decay", from 10 % to 90 % of the steps, without noise; "compensate", the
        same with noise to the end; "clear", from 5 % to 85 %, with noise until the
        factor falls below 0.2.
      steps: the number of steps of the whole training.

    Raises:
      ValueError: another name, or too few steps.

    Example:
      >>> import jlora.schedules
      >>> factor, noise = jlora.schedules.setting("clear", 100)
      >>> float(factor(99)), float(noise(99))
      (0.0, 0.0)
    """
    if name not in _SETTINGS:
        raise ValueError(
            f"schedules.setting: {name!r}: expected one of {', '.join(_SETTINGS)}."
        )
    begin, end, noise = _SETTINGS[name]
    if steps != int(steps) or int(end * steps) <= int(begin * steps):
        raise ValueError(
            f"schedules.setting: {steps!r} steps: expected a whole number of them, "
            f"enough to fade between {begin:.0%} and {end:.0%} of them."
        )
    factor = decay(steps, begin, end)
    return Setting(factor, noise(factor))
