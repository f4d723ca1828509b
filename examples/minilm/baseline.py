"""What the LoRA run has to beat: the same head on the frozen encoder's embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize

PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""L2 penalties that are tried; the validation sentences choose."""


def head_only(features: dict, labels: dict, classes: int) -> tuple[float, float]:
    """Trains the head alone to convergence: its test accuracy, and the penalty chosen.

    `features` and `labels` are by part: train, validation, test. The problem is convex
    and L-BFGS solves it, so the baseline owes nothing to a learning rate.
    """
    width = features["train"].shape[1]

    def scores(head, x):
        return x @ head[:-classes].reshape(width, classes) + head[-classes:]

    @jax.jit
    @jax.value_and_grad
    def loss(head, penalty):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            scores(head, features["train"]), labels["train"]
        )
        return losses.mean() + penalty / 2 * jnp.sum(head[:-classes] ** 2)

    def accuracy(head, part):
        found = np.asarray(scores(head, features[part])).argmax(-1)
        return (found == labels[part]).mean()

    head, tried = np.zeros((width + 1) * classes), []
    for penalty in PENALTIES:  # from strong to weak, each from where the last ended
        head = minimize(loss, head, args=penalty, jac=True, method="L-BFGS-B").x
        validation, test = (accuracy(head, part) for part in ("validation", "test"))
        tried.append((validation, test, penalty))
    _, test, penalty = max(tried, key=lambda entry: entry[0])
    return float(test), penalty
