import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save

import ddfast
from ddfast.config import TrajectoryConfig
from ddfast.errors import DDFastError
from ddfast.models.toy import ToyTeacher
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import TrajectoryStore, checksum

TEACHER = ToyTeacher()
SETTINGS = store_settings(TEACHER, TrajectoryConfig(shard_size=50), seed=3)


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def made(path, count=200, settings=SETTINGS):
    store = TrajectoryStore.open_or_create(path, settings)
    generate_trajectories(TEACHER, store, count)
    return store


def test_pairs_are_the_teachers_flow(tmp_path):
    pairs = made(tmp_path).load()
    assert pairs.codes.dtype == torch.uint8
    assert pairs.codes.shape == (200, 4)
    assert torch.equal(pairs.index, torch.arange(200))
    noise = ddfast.noise(3, torch.arange(200), (4, 2))
    assert torch.equal(pairs.noise(torch.tensor([5, 199])), noise[[5, 199]])
    again = TEACHER.generate(pairs.condition, sampler="flow", noise=noise)
    assert (again != pairs.codes).float().mean() < 0.01


def test_count_cuts_and_grows(tmp_path):
    store = made(tmp_path, 70)
    assert store.num_shards() == 2
    assert len(store.load(70).codes) == 70
    before = contents(tmp_path)
    made(tmp_path, 201)
    assert store.num_shards() == 5
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after == contents(made(tmp_path / "fresh", 201).path)


def test_any_number_of_processes_makes_the_same_store(tmp_path, monkeypatch):
    whole = contents(made(tmp_path / "one", 300).path)
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        made(tmp_path / "three", 300)
    assert contents(tmp_path / "three") == whole


@pytest.mark.parametrize(("num_codes", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65537, torch.uint32)])
def test_codes_take_the_smallest_unsigned_type(tmp_path, num_codes, dtype):
    settings = dataclasses.replace(SETTINGS, num_codes=num_codes, shard_size=2)
    store = TrajectoryStore.create(tmp_path, settings)
    codes = torch.tensor([[0, 1, 2, num_codes - 1]] * 2)
    store.write_shard(0, codes, torch.zeros(2, dtype=torch.int64))
    pairs = store.load()
    assert pairs.codes.dtype == dtype
    assert torch.equal(pairs.codes.long(), codes)


def test_noise_can_be_stored(tmp_path):
    pairs = made(tmp_path, 50, dataclasses.replace(SETTINGS, store_noise=True)).load()
    assert pairs.stored_noise is not None
    assert torch.equal(pairs.noise(torch.arange(50)), ddfast.noise(3, torch.arange(50), (4, 2)))


def test_other_settings_are_refused_by_name(tmp_path):
    made(tmp_path, 50)
    with pytest.raises(DDFastError, match="made with other settings: steps is 20, not 30; seed is 3, not 4; choose"):
        TrajectoryStore.open_or_create(tmp_path, dataclasses.replace(SETTINGS, seed=4, steps=30))
    with pytest.raises(DDFastError, match="already holds"):
        TrajectoryStore.create(tmp_path, SETTINGS)


def test_another_teacher_is_refused(tmp_path):
    store = TrajectoryStore.create(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="expected the store's teacher"):
        generate_trajectories(ToyTeacher(seed=1), store, 50)
    with pytest.raises(ValueError, match="count: got 0"):
        generate_trajectories(TEACHER, store, 0)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_named_and_can_be_remade(tmp_path, damage):
    store = made(tmp_path, 150)
    whole = contents(tmp_path)
    path = store.shard_path(1)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-20] ^= 1
    path.write_bytes(data[:100] if damage == "truncate" else b"" if damage == "empty" else data)
    with pytest.raises(DDFastError, match=r"shard-000001.safetensors is damaged .* delete it and run again"):
        store.load()
    path.unlink()
    with pytest.raises(DDFastError, match="is missing"):
        store.load(150)
    made(tmp_path, 150)
    assert contents(tmp_path) == whole


def test_a_damaged_manifest_and_no_store(tmp_path):
    with pytest.raises(DDFastError, match="no trajectory store at"):
        TrajectoryStore.open(tmp_path)
    store = TrajectoryStore.create(tmp_path, SETTINGS)
    with pytest.raises(DDFastError, match="holds no trajectories yet"):
        store.load()
    (tmp_path / "manifest.json").write_text('{"format": 1, "teach')
    with pytest.raises(DDFastError, match=r"manifest.json is damaged"):
        TrajectoryStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DDFastError, match="format 99"):
        TrajectoryStore.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("shard_size", 0, "shard_size: got 0, expected a positive number"),
        ("shard_size", "50", "shard_size: got '50', expected int"),
        ("num_codes", -1, "num_codes: got -1, expected a positive number"),
        ("seed", -1, "seed: got -1"),
        ("cfg_scale", None, "cfg_scale: got nothing, expected float"),
        ("store_noise", 1, "store_noise: got 1, expected bool"),
        ("more", 1, "'more' is unknown"),
    ],
)
def test_a_manifest_says_what_it_has_to(tmp_path, name, value, words):
    TrajectoryStore.create(tmp_path, SETTINGS)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(DDFastError, match=rf"manifest\.json is damaged \(.*{words}"):
        TrajectoryStore.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("condition", lambda tensor: tensor.view(torch.uint64)),
        ("codes", lambda tensor: tensor.view(torch.int8)),
        ("codes", lambda tensor: tensor.reshape(-1)),
        ("codes", lambda tensor: tensor.reshape(tensor.shape[1], tensor.shape[0])),
        ("index", lambda tensor: tensor + 50),
        ("noise", lambda tensor: torch.zeros(3, dtype=torch.float32)),
    ],
)
def test_a_shard_has_the_types_and_shapes_of_its_store(tmp_path, name, change):
    """Its checksum is of bytes and names alone: here it is right."""
    store = made(tmp_path, 50)
    tensors = store.read_shard(0)
    tensors[name] = change(tensors.get(name)).contiguous()
    store.shard_path(0).write_bytes(save(tensors, {"sha256": checksum(tensors)}))
    with pytest.raises(DDFastError, match=r"of another store \(its header differs\); delete it and run again"):
        store.load()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DDFastError, match="cannot write"):
        TrajectoryStore.create(tmp_path / "file", SETTINGS)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ddfast.config import TrajectoryConfig
from ddfast.models.toy import ToyTeacher
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import TrajectoryStore, checksum
teacher = ToyTeacher()
store = TrajectoryStore.open_or_create(sys.argv[1], store_settings(teacher, TrajectoryConfig(shard_size=50), 3))
generate_trajectories(teacher, store, 2000)
"""


def test_killed_at_any_moment_it_ends_with_the_same_store(tmp_path):
    call = [sys.executable, "-c", SCRIPT]
    subprocess.run([*call, str(tmp_path / "whole")], check=True)
    target = tmp_path / "killed"
    for shards in (1, 12):
        process = subprocess.Popen([*call, str(target)])
        while not (target / f"shard-{shards:06d}.safetensors").exists() and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*call, str(target)], check=True)
    ours = {name: data for name, data in contents(target).items() if not name.endswith(".tmp")}
    assert ours == contents(tmp_path / "whole")
