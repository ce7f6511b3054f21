"""Theirs: Magika, bytes in, the probabilities of 214 types of files out."""

import json
from functools import cache
from pathlib import Path

import magika
import numpy as np
import onnxruntime
import torch

from examples.somebody_elses_model.listings import Listing

FOLDER = Path(magika.__file__).parent / "models" / "standard_v3_3"
LABELS = json.loads((FOLDER / "config.min.json").read_text())["target_labels_space"]
GFLOP = 2e-9 * (2048 * 257 * 64 + 508 * 512 * 256 * 5 + 512 * 214)  # of a file: the products in the model's graph


def probabilities(listings: list[Listing], cuts: np.ndarray) -> np.ndarray:
    """What the model says, [files, 214], of listings whose lines are cut at columns, in Magika's own form of input."""
    tokens, cut = np.full((len(listings), 2048), 256, np.int32), iter(cuts.tolist())
    for row, (_, first, last) in zip(tokens, listings, strict=True):
        begin = b"\n".join([line[next(cut) :] for line in first]).lstrip()[:1024]
        end = b"\n".join([line[next(cut) :] for line in last]).rstrip()[-1024:]
        row[: len(begin)], row[2048 - len(end) :] = list(begin), list(end)
    runs = [session().run(None, {"bytes": tokens[k : k + 16]}) for k in range(0, len(tokens), 16)]
    return np.concatenate([np.asarray(run[0]) for run in runs])


@cache
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(FOLDER / "model.onnx", options)


def types_of(listings: list[Listing]) -> list[int]:
    return [LABELS.index(label) for label, _, _ in listings]
