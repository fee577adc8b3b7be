"""The stream that makes pairs: batches, the write behind the decoding, what ends it early, and how fast it was."""

import dataclasses
import errno
import json
import os
import threading
import time

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like
from small import build

from ddfast.config import TrainConfig, TrajectoryConfig
from ddfast.errors import DDFastError
from ddfast.models.toy import ToyTeacher
from ddfast.ops import dispatch
from ddfast.pipeline import make_trajectories
from ddfast.runs import claim_folder
from ddfast.trajectories import memory
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.memory import free_bytes, largest_batch, sample_bytes
from ddfast.trajectories.store import TrajectoryStore

SECONDS = 20  # in which another thread must have done what a test waits for


class Watched(ToyTeacher):
    """Calls `before(number of the call, batch size)` whenever it is to decode."""

    def __init__(self, before=lambda call, batch: None):
        super().__init__()
        self.before, self.batches = before, []

    def generate(self, condition, **settings):
        self.batches.append(len(condition))
        self.before(len(self.batches), len(condition))
        return super().generate(condition, **settings)


class WatchedStore(TrajectoryStore):
    """Calls `before(shard)` in the thread that is to write it."""

    def write_shard(self, shard, *tensors):
        self.before(shard)
        super().write_shard(shard, *tensors)


def new_store(path, teacher=None, *, kind=TrajectoryStore, shard_size=20, **settings):
    teacher = teacher or ToyTeacher()
    made = store_settings(teacher, TrajectoryConfig(shard_size=shard_size, **settings), seed=3)
    return kind.open_or_create(path, made)


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def whole(tmp_path):
    """What a store of 100 pairs holds."""
    generate_trajectories(ToyTeacher(), new_store(tmp_path / "whole"), 100)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("batch_size", "batches"), [(1, [1] * 20), (7, [7] * 3), (10, [10] * 2), (19, [10] * 2), (20, [20]), (999, [20])]
)
def test_batches_make_the_same_store(tmp_path, whole, batch_size, batches):
    """All batches of a shard have one size, at most the one asked for, and none reaches into the next shard."""
    teacher = Watched()
    made = generate_trajectories(teacher, new_store(tmp_path / "store"), 100, batch_size=batch_size)
    assert teacher.batches == 5 * batches
    assert made.batch_size == batches[0]
    assert contents(tmp_path / "store") == whole


@pytest.mark.parametrize("groups", [(1,) * 9, (1, 4, 9)], ids=["tokens", "scales"])
def test_batches_of_a_transformer_differ_by_rounding_at_most(tmp_path, groups):
    teacher = build(groups, trained=True)[0]
    codes = []
    for batch_size in (3, 20):
        store = new_store(tmp_path / str(batch_size), teacher, store_noise=True)
        generate_trajectories(teacher, store, 40, batch_size=batch_size)
        pairs = store.load()
        codes.append(pairs.codes.long())
        assert torch.equal(
            pairs.noise(torch.arange(40)), dataclasses.replace(pairs, stored_noise=None).noise(pairs.index)
        )
    # A code that rounding decides takes those after it along, so samples are counted, not codes.
    assert (codes[0] != codes[1]).any(1).float().mean() <= 0.05
    assert len(codes[0].unique(dim=0)) > 20


def test_the_next_shard_is_decoded_while_one_is_written_and_no_third(tmp_path, whole):
    begun = [threading.Event() for _ in range(5)]
    teacher = Watched(lambda call, batch: begun[call - 1].set())
    store = new_store(tmp_path / "store", kind=WatchedStore)
    seen = []

    def before(shard):
        assert threading.current_thread() is not threading.main_thread()
        if shard < 4:
            assert begun[shard + 1].wait(SECONDS), f"shard {shard + 1} waits for the write of shard {shard}"
        if shard < 3:
            seen.append(begun[shard + 2].wait(0.1))

    store.before = before
    generate_trajectories(teacher, store, 100)
    assert seen == [False] * 3, "a shard was begun with two of its predecessors not yet written"
    assert contents(tmp_path / "store") == whole


def test_a_failed_write_ends_it_with_one_error_and_keeps_what_is_finished(tmp_path, whole, monkeypatch):
    replace = os.replace

    def full_at_shard_2(source, target):
        if target.name == "shard-000002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    store = new_store(tmp_path / "store")
    teacher = Watched()
    with monkeypatch.context() as patch, pytest.raises(DDFastError) as raised:
        patch.setattr(os, "replace", full_at_shard_2)
        generate_trajectories(teacher, store, 100)
    assert str(raised.value) == f"cannot write {store.shard_path(2)}: No space left on device"
    assert len(teacher.batches) <= 4  # the shard that was being decoded, and no other
    names = ["manifest.json"] + [f"shard-00000{shard}.safetensors" for shard in (0, 1, 3)]
    assert contents(tmp_path / "store") == {name: whole[name] for name in names}
    generate_trajectories(ToyTeacher(), store, 100)
    assert contents(tmp_path / "store") == whole


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_interrupted_it_finishes_the_shards_that_are_decoded(tmp_path, whole, interruption):
    decoding = threading.Event()

    def before(call, batch):
        if call == 6:  # the second half of the third shard
            decoding.set()
            raise interruption

    store = new_store(tmp_path / "store", kind=WatchedStore)
    store.before = lambda shard: shard == 1 and (decoding.wait(SECONDS), time.sleep(0.05))
    with pytest.raises(interruption):
        generate_trajectories(Watched(before), store, 100, batch_size=10)
    names = ["manifest.json", "shard-000000.safetensors", "shard-000001.safetensors"]
    assert contents(tmp_path / "store") == {name: whole[name] for name in names}
    store.before = lambda shard: None
    assert generate_trajectories(ToyTeacher(), store, 100).pairs == 60
    assert contents(tmp_path / "store") == whole


def test_progress_and_throughput_count_what_was_missing(tmp_path):
    store = new_store(tmp_path)
    calls = []
    generate_trajectories(ToyTeacher(), store, 40)
    made = generate_trajectories(
        ToyTeacher(), store, 90, batch_size=10, progress=lambda done, total, text: calls.append((done, total, text))
    )
    assert [call[:2] for call in calls] == [(done, 60) for done in range(10, 61, 10)]
    assert all(text.endswith(" pairs/s") for _, _, text in calls)
    assert made.pairs == 60
    assert made.pairs_per_s == 60 / made.seconds
    nothing = generate_trajectories(ToyTeacher(), store, 100)
    assert (nothing.pairs, nothing.pairs_per_s) == (0, 0.0)


def test_throughput_is_printed_and_recorded_for_every_call_that_makes_pairs(tmp_path, capsys, monkeypatch):
    config = TrainConfig(out=tmp_path, trajectories=TrajectoryConfig(count=40, shard_size=20, batch_size=15))
    for count in (40, 40, 60):
        config.trajectories.count = count
        make_trajectories(config, ToyTeacher(), lambda done, total, text: None)
    first, second = (json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines())
    assert [line["pairs"] for line in (first, second)] == [40, 20]
    assert first["pairs_per_s"] == pytest.approx(first["pairs"] / first["seconds"])
    assert (first["batch_size"], first["device"], first["process"], first["processes"]) == (10, "cpu", 0, 1)
    assert {"processor", "gpu", "torch", "ddfast"} <= first.keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"trajectories: 40 pairs, {first['pairs_per_s']:.1f} pairs/s in batches of 10"
    assert printed[1] == "trajectories: all there, skipped"


def test_a_run_goes_on_with_another_batch_size(tmp_path):
    config = TrainConfig(out=tmp_path, trajectories=TrajectoryConfig(count=40, shard_size=20))
    claim_folder(config)
    make_trajectories(config, ToyTeacher(), lambda done, total, text: None)
    config.trajectories.batch_size = 5
    claim_folder(config)
    config.trajectories.steps = 5
    with pytest.raises(DDFastError, match=r"trajectories\.steps is 20, not 5"):
        claim_folder(config)


def test_wrong_batch_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size: got -1, expected a positive number, or 0"):
        TrajectoryConfig(batch_size=-1)
    with pytest.raises(ValueError, match="batch_size: got -1, expected a positive number, or 0"):
        generate_trajectories(ToyTeacher(), new_store(tmp_path), 20, batch_size=-1)


# How many fit -----------------------------------------------------------------------------------------------------


def test_the_batch_is_what_fits_into_free_memory(tmp_path, whole, monkeypatch):
    sample = sample_bytes(ToyTeacher())
    for fitting, batches in ((1, [1] * 20), (12, [10] * 2), (1000, [20])):
        monkeypatch.setattr(memory, "free_bytes", lambda device, fitting=fitting: int(1.25 * (fitting + 0.5) * sample))
        assert largest_batch(ToyTeacher()) == fitting
        teacher = Watched()
        generate_trajectories(teacher, new_store(tmp_path / str(fitting)), 100)
        assert teacher.batches == 5 * batches
        assert contents(tmp_path / str(fitting)) == whole


def test_memory_for_less_than_a_sample_is_refused_and_can_be_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    store = new_store(tmp_path)
    with pytest.raises(DDFastError, match=r"not enough memory on cpu: .* try with --trajectories.batch-size 1"):
        generate_trajectories(ToyTeacher(), store, 20)
    assert store.num_shards() == 0
    generate_trajectories(ToyTeacher(), store, 20, batch_size=1)
    assert store.num_shards() == 1


def test_a_batch_that_does_not_fit_after_all_is_one_error(tmp_path):
    def before(call, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    with pytest.raises(DDFastError, match=r"^10 samples at a time do not fit in the memory of cpu; give --traj"):
        generate_trajectories(Watched(before), new_store(tmp_path), 20, batch_size=10)


def cache_bytes(layers, positions, heads, head_dim, bytes_per_value):
    """Keys and values of a guided sample's two rows."""
    return 2 * 2 * layers * positions * heads * head_dim * bytes_per_value


def test_what_a_sample_takes_is_its_full_cache_and_some_rows():
    var, llamagen = var_teacher_like(depth=4), llamagen_teacher_like(n_layer=8, n_kv_head=2)
    half = llamagen_teacher_like(n_layer=8, n_kv_head=2).bfloat16()
    for teacher, cache in (
        (var, cache_bytes(4, 14, 2, 64, 4)),
        (llamagen, cache_bytes(8, 9, 2, 16, 4)),
        (half, cache_bytes(8, 9, 2, 16, 2)),
    ):
        widest = max(module.out_features for module in teacher.modules() if isinstance(module, torch.nn.Linear))
        rest = sample_bytes(teacher) - cache
        assert 0 < rest - 4 * memory._ROWS * max(teacher.groups) * widest < cache  # condition, modulations, noise


def test_without_guidance_a_sample_takes_half():
    teacher = build((1,) * 30)[0]
    alone = sample_bytes(teacher)
    teacher.defaults = dataclasses.replace(teacher.defaults, cfg_scale=2.0)
    both = sample_bytes(teacher)
    cache = cache_bytes(2, 30, 4, 8, 4)
    assert cache / 2 < both - alone < 1.1 * cache / 2


def test_a_cache_that_grows_is_counted_full():
    class Growing(ToyTeacher):
        def advance(self, state, codes):
            state.cache = [*getattr(state, "cache", []), {"keys": torch.zeros(len(codes), codes.shape[1], 1000)}]
            return super().advance(state, codes)

    known = 3  # all tokens but the last
    assert sample_bytes(Growing()) - sample_bytes(ToyTeacher()) == 4 * known * 1000


def test_weights_that_a_state_refers_to_are_not_a_samples():
    class Referring(ToyTeacher):
        def begin(self, condition, *, guided):
            state = super().begin(condition, guided=guided)
            state.tables, state.teacher, state.itself = self.tables[:, 0], self, state
            return state

    assert sample_bytes(Referring()) == sample_bytes(ToyTeacher())


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    alone = free_bytes(torch.device("cpu"))
    assert 2**20 < alone < 2**50
    monkeypatch.setattr(memory, "_available_ram", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 250


def test_another_backend_does_not_go_on(tmp_path, monkeypatch):
    """Its codes now and then differ; a store with nothing missing is read by whoever wants it."""
    monkeypatch.setenv("DDFAST_BACKEND", "sample_codes=reference")
    store = new_store(tmp_path / "store")
    assert store.settings.backend == "reference"
    generate_trajectories(ToyTeacher(), store, 20)
    monkeypatch.delenv("DDFAST_BACKEND")
    if dispatch.choose("sample_codes", "cpu", torch.float32).backend == "reference":
        pytest.skip("the native module is not built")
    store = new_store(tmp_path / "store")  # with settings of this machine: not refused
    before = contents(tmp_path / "store")
    assert generate_trajectories(ToyTeacher(), store, 20).pairs == 0
    message = r"begun with the backend 'reference' of sample_codes, here it is 'cpu': set DDFAST_BACKEND"
    with pytest.raises(DDFastError, match=message):
        generate_trajectories(ToyTeacher(), store, 40)
    assert contents(tmp_path / "store") == before
    monkeypatch.setenv("DDFAST_BACKEND", "sample_codes=reference")
    assert generate_trajectories(ToyTeacher(), store, 40).pairs == 20


def test_a_store_of_before_backends_were_kept_goes_on(tmp_path):
    store = new_store(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["backend"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    store = new_store(tmp_path / "store")
    assert store.settings.backend == ""
    assert generate_trajectories(ToyTeacher(), store, 20).pairs == 20
