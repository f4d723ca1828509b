"""Handwritten digits in two tasks: a base learns 0 to 4, an adapter then 5 to 9."""

import numpy as np
from sklearn.datasets import load_digits

OLD, NEW = range(5), range(5, 10)


def load(classes):
    """(images, labels) of the classes to train on, and the same to test on.

    Images are float32 (n, 8, 8, 1) in [0, 1], labels int32 (n,); every fifth one tests.
    """
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[..., None]
    labels = data.target.astype(np.int32)
    mine = np.isin(labels, list(classes))
    images, labels = images[mine], labels[mine]
    test = np.arange(len(labels)) % 5 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def batches(data, steps, size=64, seed=0):
    """`steps` random batches."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(data[1]), size)
        yield data[0][rows], data[1][rows]
