"""3L on VGG16: the counts of both factorisations, and a run of a smaller sibling.

    python examples/fade/vgg.py                   # minutes on 2 cores
    python examples/fade/vgg.py --quick           # every step of it in seconds
    python examples/fade/vgg.py --width 64        # VGG16 itself, for a GPU

VGG16 for 32x32 images has 13 convolutions. loralib factorises each as a reshaped
product of matrices; jlora's own form is a convolution to r features and a 1x1 one. The
run takes Fashion-MNIST and a VGG16 with an eighth of the channels, trains it, and fades
its convolutions away.
"""

import argparse
import gzip
from pathlib import Path

import fading
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from fading import Variant

import jlora
from jlora.loralib import Kernel

RANK = 32
WATCH = "Conv_4/kernel"
FASHION = Path("/usr/share/datasets/fashion-mnist")


class VGG16(nn.Module):
    """Images (batch, 32, 32, channels) to logits (batch, 10)."""

    width: int = 64

    @nn.compact
    def __call__(self, x):
        for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
            for _ in range(convolutions):
                features = self.width * min(2**stage, 8)
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.width * 8)(x))
        return nn.Dense(10)(x)


def wrap(model, params, images, rank=RANK, form=None, lora_bias=True):
    """The tree in which every convolution has factors, and C."""
    rule = jlora.Rule("Conv_*/kernel", form=form)
    plan = jlora.plan(
        lambda params, x: model.apply({"params": params}, x),
        params,
        images,
        rank=rank,
        alpha=rank,
        targets="Conv_*/kernel",
        rules=[rule],
    )
    return jlora.wrap(params, plan=plan, lora_bias=lora_bias)


def counts() -> dict[str, int]:
    """The figures of the document and of jlora's form, of models that are not run."""
    model, images = VGG16(), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    loralib = jlora.count(wrap(model, params, images, form=Kernel()))
    own = jlora.count(wrap(model, params, images))
    return {
        "VGG16": sum(x.size for x in jax.tree.leaves(params)),
        "loralib's ConvLoRA and C, trainable": loralib[0],
        "loralib's ConvLoRA and C, in all": loralib[1],
        "jlora's own form and C, trainable": own[0],
    }


def fashion(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST as images in [0, 1] padded to 32x32, and labels, by part."""

    def read(name):
        try:
            data = gzip.decompress((folder / name).read_bytes())
        except OSError as e:
            raise SystemExit(
                f"{folder / name}: {e.strerror or e}. It is Zalando's Fashion-MNIST, "
                "on Debian and Ubuntu:\n"
                "  apt-get download dataset-fashion-mnist\n"
                "  dpkg-deb -x dataset-fashion-mnist_*.deb fashion\n"
                "then --data fashion/usr/share/datasets/fashion-mnist, or any folder "
                "with its four .gz files"
            ) from None
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i]) for i in range(data[3])]
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

    def part(name):
        images = read(f"{name}-images-idx3-ubyte.gz").astype(np.float32) / 255
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
        return images, read(f"{name}-labels-idx1-ubyte.gz").astype(np.int32)

    images, labels = part("train")
    return {
        "train": (images[:55000], labels[:55000]),
        "validation": (images[55000:57000], labels[55000:57000]),
        "test": part("t10k"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps, few images")
    parser.add_argument("--width", type=int, default=8, help="features of stage one")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--data", type=Path, default=FASHION)
    parser.add_argument("--out", type=Path, default=Path("runs/fade"))
    args = parser.parse_args()

    print("parameters")
    for name, n in counts().items():
        print(f"  {n:>10,}  {name}")

    data = fashion(args.data)
    steps, size = (12, 16) if args.quick else (args.steps, 64)
    if args.quick:
        data = {name: (x[:64], y[:64]) for name, (x, y) in data.items()}
    model = VGG16(args.width)

    def logits(params, x):
        return model.apply({"params": params}, x)

    def batches(i):
        images, labels = data["train"]
        rows = np.random.default_rng([0, i]).integers(len(images), size=size)
        return (images[rows],), labels[rows]

    def accuracy(predict, part):
        images, labels = data[part]
        right = sum(
            int((predict(images[i : i + 500]).argmax(-1) == labels[i : i + 500]).sum())
            for i in range(0, len(images), 500)
        )
        return right / len(images)

    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    params = fading.train_whole(logits, params, batches, 2 * steps, 2e-3)
    whole = accuracy(lambda x: jax.jit(logits)(params, x), "test")
    last = Variant("the same, loralib's form", "clear", 2, lora_bias=True)
    results = []
    for variant in (*fading.variants(args.rank), last):
        form = Kernel() if variant is last else None
        image = jnp.zeros((1, 32, 32, 1))
        tree = wrap(model, params, image, variant.rank, form, variant.lora_bias)
        results.append(
            fading.train(
                logits,
                tree,
                variant,
                batches,
                steps,
                accuracy,
                watch=WATCH,
                learning_rate=3e-3,
            )
        )
    total = sum(x.size for x in jax.tree.leaves(params))
    reference = "the base, trained whole", total, whole
    fading.show("vgg", results, reference, WATCH, args.out, record=not args.quick)


if __name__ == "__main__":
    main()
