"""Every loader of ddfast, with valid files of its own making: what is fuzzed, in one table.

A target reads a file and uses what it read as its callers do, up to the work itself.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import tomli_w
import torch
from PIL import Image

from ddfast import cli, hub, runs
from ddfast.config import TrainConfig, plain
from ddfast.distill import checkpoints
from ddfast.distill.tracking import json_lines, read_log
from ddfast.evaluation import clip, inception, judgements, references
from ddfast.evaluation.images import open_images
from ddfast.hub import Generator
from ddfast.models.caption_files import read_texts
from ddfast.models.checkpoint import load_tensors, read_checkpoint, read_tensor, save_tensors, tensors_of
from ddfast.models.llamagen.captions import load_captions, random_captions, save_captions
from ddfast.models.loading import start_student, untrained_teacher
from ddfast.ops import findings
from ddfast.recipes import get_recipe
from ddfast.runs import Stages
from ddfast.saving import Kept
from ddfast.trajectories.store import MANIFEST, StoreSettings, TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loader.

    Attributes:
        file: the name under which it finds what it reads.
        seeds: makes valid files; called in a new folder, in which what lies beside the file is left.
        read: loads the file, and uses it.
        kind: of its changes (`mutations.KINDS`); empty: by the first bytes.
        sealed: a file of which every byte is told by a digest.
    """

    file: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], Any]
    kind: str = ""
    sealed: bool = False


def written(write: Callable[[Path], Any]) -> bytes:
    """What a function writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        write(path)
        return path.read_bytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


# Checkpoints.

_TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "code": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3, dtype=torch.float64),
}


def _ours(folder: Path) -> list[bytes]:
    return [written(lambda path: save_tensors(path, _TENSORS, {"student": {"width": 8}, "captions": ["a", "b"]}))]


def _checkpoints(folder: Path) -> list[bytes]:
    options = argparse.Namespace(depth=2, path=pathlib.PurePosixPath("x"), lr=np.float64(0.1), sizes=[1, 2])
    content = {"model": dict(_TENSORS), "args": options, "step": 3, "view": _TENSORS["weight"].t()[1:]}
    legacy = io.BytesIO()
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    arrays = {"m": np.zeros(3), "s": np.eye(3)}
    return [
        *_ours(folder),
        safetensors.torch.save(_TENSORS, {"format": "pt"}),
        written(lambda path: torch.save(content, path)),
        written(lambda path: torch.save(arrays, path)),
        legacy.getvalue(),
    ]


def _read_all(path: Path) -> Any:
    content, header = read_checkpoint(path)
    assert isinstance(header, dict)
    return {name: read_tensor(tensor) for name, tensor in tensors_of(content).items()}, header


def _index(folder: Path) -> list[bytes]:
    save_tensors(folder / "model-1.safetensors", {"weight": _TENSORS["weight"]}, {})
    save_tensors(folder / "model-2.safetensors", {"code": _TENSORS["code"]}, {})
    return [_json({"metadata": {}, "weight_map": {"weight": "model-1.safetensors", "code": "model-2.safetensors"}})]


# Trajectories.

_STORE = StoreSettings(
    teacher="0123456789ab", cfg_scale=1.5, temperature=1.0, top_k=0, top_p=1.0, solver="euler", steps=4, seed=0,
    num_tokens=3, num_codes=16, code_dim=2, num_classes=5, shard_size=2, store_noise=True, backend="reference",
)  # fmt: skip


def _store(folder: Path) -> TrajectoryStore:
    store = TrajectoryStore.create(folder, _STORE)
    for shard in range(2):
        codes = torch.arange(6, dtype=torch.int64).reshape(2, 3)
        store.write_shard(
            shard, codes, torch.tensor([1, 4], dtype=torch.int64), torch.ones(2, 3, 2, dtype=torch.float32)
        )
    return store


def _manifest(folder: Path) -> list[bytes]:
    _store(folder)
    return [(folder / MANIFEST).read_bytes()]


def _shard(folder: Path) -> list[bytes]:
    store = _store(folder)
    return [store.shard_path(0).read_bytes()]


def _read_store(path: Path) -> Any:
    store = TrajectoryStore.open(path.parent)
    pairs = store.load(3)
    return [*pairs.noise(torch.tensor([0, 2], dtype=torch.int64)), pairs.codes, pairs.condition, store.num_shards()]


# Runs.


@functools.cache
def _generator() -> Generator:
    config = get_recipe("digits")
    config.teacher.width, config.teacher.depth = 16, 1  # type: ignore[attr-defined]
    config.tokenizer.width = 8  # type: ignore[attr-defined]
    teacher = untrained_teacher(config)
    return Generator(teacher, start_student(teacher).eval(), point=2)


def _settings(folder: Path) -> list[bytes]:
    made = []
    for recipe in ("digits", "var-d16", "llamagen-xl-t2i"):
        made.append(tomli_w.dumps(plain(get_recipe(recipe))).encode())
    return [b'recipe = "digits"\nmethod = "dd2"\n[dd1]\npoint = 2\n', *made]


def _open_run(path: Path) -> Any:
    with mock.patch.object(runs, "build_teacher", lambda config, progress: None):
        return runs.open_teacher(path.parent, "cpu", lambda *_: None)


def _parse(path: Path) -> Any:
    with mock.patch.object(cli, "_parsed", lambda *_, default: default):
        options = cli.parse("train", TrainConfig, ["--config", str(path)], "")
    return cli.of_other_methods(options), cli.of_other_weights(options), plain(options)


def _of_run(path: Path) -> Any:
    made = _generator()
    with mock.patch.object(hub, "open_student", lambda *_, files: (get_recipe("digits"), made.teacher, made.student)):
        return Generator.from_run(path.parent).card


def _metrics(folder: Path) -> list[bytes]:
    row = {
        "frechet": 1.0,
        "frechet_error": 0.1,
        "teacher_nll": 2.0,
        "count": 5000,
        "seconds_per_image": {"1": 0.1, "64": 0.2},
    }
    row |= {
        "speedup_vs_ar": {"1": 2.0, "64": 3.0},
        "path_length": 0.1,
        "path_length_clipped": 0.2,
        "by_class": {"teacher_nll": {"0": 1.0, "1": 2.0}},
        "least_likely": {"number": [3, 1], "teacher_nll": [9.0, 8.0]},
    }
    sources = ("teacher", "student_1step")
    return [_json({"num_groups": 8, "path_distance": "features", **dict.fromkeys(sources, row)})]


def _read_stages(path: Path) -> Any:
    stages = Stages(path)
    with stages.timed("teacher"):
        pass
    return sum(stages.seconds.values()), _of_run(path)


def _log(folder: Path) -> list[bytes]:
    lines = ({"stage": "distillation", "step": step, "loss": 0.5, "x": [1]} for step in range(3))
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]  # type: ignore[list-item]


def _read_lines(path: Path) -> Any:
    read_log(path)
    with json_lines(path.parent, "distillation", 1, {}) as sink:
        sink(2, {"loss": 1.0})
    return read_log(path)


def _hub(folder: Path) -> None:
    _generator().save_pretrained(folder)


def _hub_file(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        _hub(folder)
        return [(folder / name).read_bytes()]

    return seeds


def _from_hub(path: Path) -> Any:
    made = Generator.from_pretrained(path.parent)
    return made.card, made.point


# Checkpoints of a training.


_PLACE = f"{checkpoints.FOLDER}/distillation-00000003"


def _in_checkpoint(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        tensors = {"weight": _TENSORS["weight"].clone(), "scale": torch.tensor(0.5, dtype=torch.float64)}
        checkpoints.Checkpoints(folder, "distillation", "identity").save(tensors, {"step": 3, "figures": {"loss": 0.5}})
        return [(folder / _PLACE / name).read_bytes()]

    return seeds


def _resume(path: Path) -> Any:
    found = checkpoints.Checkpoints(path.parents[2], "distillation", "identity").newest()
    return None if found is None else found[1]


def _fill(path: Path) -> Any:
    names = checkpoints.names_in(path.parent)
    into = {"weight": torch.empty(2, 3, dtype=torch.float32)}
    checkpoints.load(path.parent, into)
    return names, into


# Evaluation.


def _npz(folder: Path) -> list[bytes]:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    labels = np.array([1, 2], dtype=np.int64)
    made = io.BytesIO()
    np.savez(made, arr_0=pixels, arr_1=labels)
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=pixels, arr_1=labels)
    told = bytearray(made.getvalue())
    comment = b'{"count": 2, "labels": "uniform"}'
    told[-2:] = len(comment).to_bytes(2, "little") + comment  # the end of the archive: how long its comment is
    return [bytes(told), made.getvalue(), packed.getvalue()]


def _read_images(path: Path) -> Any:
    images = open_images(path, "--images")
    return [(batch.pixels, batch.condition) for batch in images.batches(1)]


def _pictures(folder: Path) -> list[bytes]:
    made = []
    for mode, form in itertools.product(("RGB", "L", "P"), ("PNG", "JPEG")):
        if (mode, form) != ("P", "JPEG"):
            data = io.BytesIO()
            Image.effect_mandelbrot((8, 8), (-2, -1, 1, 1), 9).convert(mode).save(data, form)
            made.append(data.getvalue())
    (folder / "images").mkdir()
    (folder / "images/00001-class002.png").write_bytes(made[0])
    return made


def _samples(folder: Path) -> list[bytes]:
    (folder / "images").mkdir()
    for number in range(2):
        (folder / f"images/{number:05d}-class001.png").write_bytes(_pictures_once())
    return [_json({"count": 2, "labels": "uniform", "preset": "", "seed": 0, "steps": 1})]


@functools.cache
def _pictures_once() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    return data.getvalue()


def _read_samples(path: Path) -> Any:
    Kept("files", path.parent, {"count": 2}).check({"count": 2})
    return _read_images(path.parent)


_WIDTHS = mock.patch.dict(references.WIDTHS, {inception.POOL: 3, inception.SPATIAL: 2})


def _reference(*names: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
        arrays["arr_0"] = np.zeros((2, 4, 4, 3), np.uint8)
        return [written(lambda path: np.savez(path.open("wb"), **{name: arrays[name] for name in names}))]

    return seeds


def _dd1_reference(folder: Path) -> list[bytes]:
    tensors = {"m": torch.zeros(3, dtype=torch.float64), "s": torch.eye(3, dtype=torch.float64)}
    arrays = {"m": np.zeros(3), "s": np.eye(3)}
    return [written(functools.partial(torch.save, one)) for one in (tensors, arrays)]


def _read_reference(instrument: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        with _WIDTHS:
            file = references.ReferenceFile(path, instrument)
        return [file.gaussians, [] if file.images is None else list(file.images.batches(1))]

    return read


def _judgement(folder: Path) -> list[bytes]:
    said = judgements.Judgement(
        instrument="adm", source="images", count=50_000, size=(256, 256),
        figures={"fid": 2.0, "fid_error": 0.1, "recall": 0.5}, inception={"file": "weights.pth", "sha256": "6726825d"},
        reference={"file": "reference.npz", "sha256": "0123"},
        clip={"file": "clip", "sha256": "01", "captions": "23"}, preset="var-readme",
        settings={"labels": "uniform", "changed": ["count 3"]}, versions={"torch": "2"},
    )  # fmt: skip
    return [said.text().encode()]


def _read_judgement(path: Path) -> Any:
    said = judgements.read_judgement(path)
    return judgements.table([said, said]), said.text()


def _features(folder: Path) -> list[bytes]:
    pair = {
        "image_features": torch.ones(2, 4, dtype=torch.float32),
        "text_features": torch.ones(2, 4, dtype=torch.float32),
    }
    return [written(lambda path: save_tensors(path, pair, {})), safetensors.torch.save(pair)]


def _read_features(path: Path) -> Any:
    return clip.FileScore(path, 2).figures()


def _processor(folder: Path) -> list[bytes]:
    return [_json({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"shortest_edge": 224}})]


def _network(folder: Path) -> list[bytes]:
    one = torch.zeros(2, 2, dtype=torch.float32)
    return [written(functools.partial(torch.save, {"Mixed_7c.a": one, "fc.weight": one, "x.num_batches_tracked": one}))]


# Captions.


def _texts(folder: Path) -> list[bytes]:
    return ["a red bird\nzwei Hunde – ä\n".encode(), "a\n".encode("utf-16"), b"\xef\xbb\xbfa\r\n\r\nb\r\n"]


def _coco(folder: Path) -> list[bytes]:
    images, captions = (
        [{"id": 1}, {"id": 2}],
        [{"image_id": 2, "caption": "two\ndogs"}, {"image_id": 1, "caption": "a bird"}],
    )
    return [_json({"info": {}, "images": images, "annotations": captions})]


def _caption_features(folder: Path) -> list[bytes]:
    return [written(lambda path: save_captions(path, *random_captions(2, 3, 4), ["a", "b"]))]


def _read_caption_features(path: Path) -> Any:
    return load_captions(path), read_texts(path)


# What was found about kernels.


def _kernels(folder: Path) -> list[bytes]:
    order = {"order": ["triton", "reference"], "reason": "timed", "rows": 64, "size": 4096, "ms": {"triton": 0.1}}
    mine = {"verdicts": {"op triton float32 8": [True, "right"]}, "orders": {"op float32 8 64 4096": order}}
    with _machine():
        key = findings.machine_key(0)
    return [_json({"format": 1, "machines": {"x": {"verdicts": {}}, key: mine}})]


def _machine() -> Any:
    return mock.patch.object(findings, "identity", lambda index: {"gpu": "any"})


def _read_kernels(path: Path) -> Any:
    device = torch.device("cuda", 0)
    with (
        _machine(),
        mock.patch.dict("os.environ", {"DDFAST_CACHE": str(path.parent)}),
        mock.patch.dict(findings._read, clear=True),
    ):
        found = findings.of(device)
        told = [findings.Verdict(*verdict[:2]) for verdict in found["verdicts"].values()]
        order = findings.order(device, "op", torch.float32, 8, 32, 4096)
        assert order is None or all(isinstance(name, str) for name in (*order.order, order.reason)), order
        assert all(isinstance(one.passed, bool) and isinstance(one.text, str) for one in told), told
        findings.add(device, "verdicts", {"other": [True, "right"]})
        return found, findings.orders_on_file(device), findings.forget_orders(device)


TARGETS = {
    "ours": Target(file="a.safetensors", seeds=_ours, read=load_tensors, sealed=True),
    "checkpoint": Target(file="a.pth", seeds=_checkpoints, read=_read_all),
    "index": Target(file="model.safetensors.index.json", seeds=_index, read=_read_all),
    "manifest": Target(file=MANIFEST, seeds=_manifest, read=_read_store),
    "shard": Target(file="shard-000000.safetensors", seeds=_shard, read=_read_store, sealed=True),
    "run's settings": Target(file=runs.CONFIG, seeds=_settings, read=_open_run, kind="toml"),
    "config": Target(file="a.toml", seeds=_settings, read=_parse, kind="toml"),
    "stages": Target(file=runs.STAGES, seeds=lambda folder: [_json({"teacher": 1.5, "report": 2})], read=_read_stages),
    "metrics": Target(file=runs.METRICS_JSON, seeds=_metrics, read=_of_run),
    "log": Target(file="metrics.jsonl", seeds=_log, read=_read_lines),
    "hub: config": Target(file="config.json", seeds=_hub_file("config.json"), read=_from_hub),
    "hub: student": Target(file="student.safetensors", seeds=_hub_file("student.safetensors"), read=_from_hub),
    "hub: teacher": Target(file="model.safetensors", seeds=_hub_file("model.safetensors"), read=_from_hub),
    "checkpoint's state": Target(file=f"{_PLACE}/state.json", seeds=_in_checkpoint("state.json"), read=_resume),
    "checkpoint's index": Target(file=f"{_PLACE}/.metadata", seeds=_in_checkpoint(".metadata"), read=_fill),
    "checkpoint's tensors": Target(file=f"{_PLACE}/__0_0.distcp", seeds=_in_checkpoint("__0_0.distcp"), read=_fill),
    "npz": Target(file="a.npz", seeds=_npz, read=_read_images),
    "picture": Target(file="images/00000-class001.png", seeds=_pictures, read=lambda path: _read_images(path.parent)),
    "samples": Target(file="images/samples.json", seeds=_samples, read=_read_samples),
    "adm reference": Target(
        file="a.npz", seeds=_reference("mu", "sigma", "mu_s", "sigma_s", "arr_0"), read=_read_reference("adm")
    ),
    "clean reference": Target(file="a.npz", seeds=_reference("mu", "sigma"), read=_read_reference("clean")),
    "dd1 reference": Target(file="a.pth", seeds=_dd1_reference, read=_read_reference("dd1")),
    "judgement": Target(file="a.json", seeds=_judgement, read=_read_judgement),
    "clip features": Target(file="a.safetensors", seeds=_features, read=_read_features),
    "clip processor": Target(
        file="preprocessor_config.json", seeds=_processor, read=lambda path: clip._normalisation(path.parent)
    ),
    "inception": Target(file="a.pth", seeds=_network, read=inception._weights),
    "captions: text": Target(file="a.txt", seeds=_texts, read=read_texts, kind="text"),
    "captions: coco": Target(file="a.json", seeds=_coco, read=read_texts),
    "captions: features": Target(
        file="a.safetensors", seeds=_caption_features, read=_read_caption_features, sealed=True
    ),
    "kernels": Target(file="kernels.json", seeds=_kernels, read=_read_kernels),
}
"""By name."""


def prepared(target: Target, folder: Path) -> list[bytes]:
    """A target's valid files, and in the folder what lies beside."""
    folder.mkdir(parents=True, exist_ok=True)
    return target.seeds(folder)
