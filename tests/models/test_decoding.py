"""Captured decoding. On the CPU a recorder stands for CUDA graphs: it repeats what was recorded, on the same memory."""

import contextlib
import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like
from small import build
from streams import Device, Recorder, Stream
from torch.utils._pytree import tree_leaves

from ddfast.models import decoding
from ddfast.models.protocol import Teacher
from ddfast.ops import dispatch

CAPTION = (torch.randn(2, 6, 12), torch.arange(6) >= torch.tensor([[0], [2]]))
TEACHERS: dict[str, Callable] = {
    "one token per group": lambda: (build((1,) * 7, trained=True)[0], torch.tensor([0, 1, 2, 0])),
    "growing groups": lambda: (build((1, 2, 4), trained=True)[0], torch.tensor([0, 1, 2, 0])),
    "LlamaGen": lambda: (llamagen_teacher_like(n_kv_head=2), torch.tensor([1, 4])),
    "LlamaGen, captions": lambda: (llamagen_teacher_like(model_type="t2i", cls_token_num=6), CAPTION),
    "VAR": lambda: (var_teacher_like(), torch.tensor([1, 4])),
}


class RecordedGraphs:
    """In the place of `decoding.CudaGraphs`; counts what is captured."""

    captures = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def turn(self, *given: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        RecordedGraphs.captures += 1
        with Recorder() as recorder:
            work()
        return recorder.replay


@pytest.fixture
def captures(monkeypatch) -> Callable[[], int]:
    """How many graphs were captured since the last call."""
    monkeypatch.setattr(decoding, "CudaGraphs", RecordedGraphs)
    RecordedGraphs.captures = 0

    def since() -> int:
        count, RecordedGraphs.captures = RecordedGraphs.captures, 0
        return count

    return since


def other(condition):
    """Another condition of the same shape."""
    return condition.flip(0) if isinstance(condition, torch.Tensor) else tuple(part.flip(0) for part in condition)


@pytest.mark.parametrize("sampler", ["flow", "multinomial", "greedy"])
@pytest.mark.parametrize("name", TEACHERS)
def test_the_same_codes_with_graphs(captures, name, sampler):
    teacher, condition = TEACHERS[name]()
    batch, tokens = len(tree_leaves(condition)[0]), teacher.num_tokens

    def codes(given, seed: int, **settings) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if sampler == "flow":
            settings["noise"] = torch.randn(batch, tokens, teacher.code_dim, generator=generator)
        elif sampler == "multinomial":
            settings["generator"] = generator
        return teacher.generate(given, sampler=sampler, cfg_scale=2.5, top_k=12, **settings)

    for number, given in enumerate((condition, other(condition), condition)):
        assert torch.equal(codes(given, number, graph=True), codes(given, number))
        shapes = 2 if len(teacher.groups) == tokens else len(teacher.groups)
        assert captures() == (1 + shapes if number == 0 else 0)
    middle = teacher.group_starts()[1]
    for _ in range(2):
        prefix = codes(other(condition), 7)[:, :middle]
        assert torch.equal(codes(condition, 8, prefix=prefix, graph=True), codes(condition, 8, prefix=prefix))
    assert captures() > 0
    assert torch.equal(codes(condition, 9, stop=middle, graph=True), codes(condition, 9, stop=middle))


def test_guidance_that_ends_asks_for_a_graph_of_its_own(captures):
    teacher, label = TEACHERS["LlamaGen"]()
    settings = {"sampler": "greedy", "cfg_scale": 3.0, "cfg_interval": 2}
    for _ in range(2):
        assert torch.equal(teacher.generate(label, graph=True, **settings), teacher.generate(label, **settings))
    assert captures() == 1 + 3  # the beginning; the first step, guided ones, unguided ones


def test_a_head_that_is_not_linear(captures):
    """Its teacher returns logits from `advance`, and both streams are filtered together."""
    teacher, label = TEACHERS["one token per group"]()
    advance = type(teacher).advance
    whole = {"read_out": Teacher.read_out, "advance": lambda self, *given: self.head(advance(self, *given))}
    expected = teacher.generate(label, sampler="greedy", cfg_scale=2.5)
    teacher.__class__ = type("Whole", (type(teacher),), whole)
    for _ in range(2):
        assert torch.equal(teacher.generate(label, sampler="greedy", cfg_scale=2.5, graph=True), expected)


def test_new_weights_are_captured_anew(captures):
    teacher, label = TEACHERS["one token per group"]()
    settings = {"sampler": "greedy", "graph": True}
    before = teacher.generate(label, **settings)
    captures()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(torch.randn_like(parameter))  # in place: the graphs read them where they were
    changed = teacher.generate(label, **settings)
    assert captures() == 0
    assert not torch.equal(changed, before)
    assert torch.equal(changed, teacher.generate(label, sampler="greedy"))
    for parameter in teacher.parameters():
        parameter.data = torch.randn_like(parameter)  # elsewhere
    assert torch.equal(teacher.generate(label, **settings), teacher.generate(label, sampler="greedy"))
    assert captures() > 0


def test_graphs_are_bounded_and_released(captures):
    teacher, _ = TEACHERS["one token per group"]()
    for batch in (1, 2, 3, 4, 5, 2, 1):
        teacher.generate(torch.zeros(batch, dtype=torch.int64), graph=True)
    assert captures() == 6 * 3  # 2 was kept, 1 had made room
    assert len(decoding._graphed[teacher]) == decoding.KEPT_GRAPHS
    decoding.release_graphs(teacher)
    assert teacher not in decoding._graphed
    decoding.release_graphs(teacher)


def test_a_teacher_that_is_gone_takes_its_graphs_along(captures):
    teacher, label = TEACHERS["one token per group"]()
    teacher.generate(label, graph=True)
    graphs = weakref.ref(next(iter(decoding._graphed[teacher].values())))
    del teacher
    gc.collect()
    assert graphs() is None


def test_what_a_graph_touches_is_kept(captures, monkeypatch):
    """A CUDA graph, unlike the recorder, holds on to nothing that was allocated before it."""
    touched = []

    class Watched(decoding.Decoding):
        def start(self) -> None:
            super().start()
            touched.extend(weakref.ref(value) for value in vars(self).values() if isinstance(value, torch.Tensor))
            touched.extend(weakref.ref(value) for value in self.inputs.tensors())

    monkeypatch.setattr(decoding, "Decoding", Watched)
    monkeypatch.setattr(RecordedGraphs, "capture", lambda _, work: work() or (lambda: None))
    teacher, label = TEACHERS["one token per group"]()
    noise = torch.randn(4, 7, 3)
    teacher.generate(label, sampler="flow", noise=noise, graph=True, stop=2)
    gc.collect()
    assert len(touched) >= 7
    assert all(reference() is not None for reference in touched)


def test_another_codebook_is_captured_anew(captures):
    """The flow's grid follows from it, and is in the graph as numbers."""
    teacher, label = TEACHERS["one token per group"]()
    settings = {"sampler": "flow", "noise": torch.randn(4, 7, 3)}
    teacher.generate(label, graph=True, **settings)
    teacher.codebook.mul_(3)
    assert torch.equal(teacher.generate(label, graph=True, **settings), teacher.generate(label, **settings))
    assert captures() == 2 * 3


@pytest.mark.parametrize("name", TEACHERS)
def test_other_kernels_are_captured_anew(captures, monkeypatch, name):
    """Whatever op of a step another backend is chosen for."""
    teacher, condition = TEACHERS[name]()
    ops = ["draw_codes", *teacher.step_ops(2, max(teacher.groups))]
    choose, changed = dispatch.choose, []

    def other_choice(op: str, *given, **more) -> dispatch.Choice:
        return dispatch.Choice("triton", "") if op in changed else choose(op, *given, **more)

    monkeypatch.setattr(dispatch, "choose", other_choice)
    monkeypatch.setattr(decoding.Decoding, "start", lambda self: self.codes.zero_())
    monkeypatch.setattr(decoding.Decoding, "step", lambda *_: None)
    for changed[:] in ([], *([op] for op in ops)):
        teacher.generate(condition, graph=True)
        assert captures() > 0, changed


@pytest.mark.parametrize("sampler", ["flow", "multinomial"])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_graph_is_asked_for_with_what_its_steps_ask(monkeypatch, name, sampler):
    """Another dimension or size could have another kernel, or one that was never verified."""
    monkeypatch.setenv("DDFAST_BACKEND", "auto")  # the CPU's shortcut decides without asking
    teacher, condition = TEACHERS[name]()
    rows = len(condition[0] if isinstance(condition, tuple) else condition)
    settings = {"noise": torch.randn(rows, teacher.num_tokens, teacher.code_dim)} if sampler == "flow" else {}
    with dispatch.observed() as asked:
        teacher.generate(condition, sampler=sampler, cfg_scale=2.0, **settings)
    in_steps = {(op, dtype, dim or dispatch.usual_dim(op), size) for op, dtype, _, dim, size in asked}
    plan = decoding.Plan(
        batch=rows, first=0, stop=len(teacher.groups), sampler=sampler, scales=(2.0,) * len(teacher.groups),
        filters=(), flow=(),
    )  # fmt: skip
    with dispatch.observed() as asked:
        decoding._choices(teacher, plan, decoding.Inputs(condition=condition, prefix=torch.empty(0), chance=None))
    before = {(op, dtype, dim or dispatch.usual_dim(op), size) for op, dtype, _, dim, size in asked}
    ops = {"sample_codes", "draw_codes", "decode_attention"}  # the others may be left to PyTorch on a CPU
    assert {one for one in in_steps if one[0] in ops} == {one for one in before if one[0] in ops}


def test_an_override_of_backends_is_captured_anew(captures, monkeypatch):
    teacher, label = TEACHERS["LlamaGen"]()
    settings = {"sampler": "greedy", "graph": True}
    codes = teacher.generate(label, **settings)
    assert captures() > 0
    monkeypatch.setenv("DDFAST_BACKEND", "activate=reference")
    assert torch.equal(teacher.generate(label, **settings), codes)
    assert captures() > 0
    monkeypatch.delenv("DDFAST_BACKEND")
    assert torch.equal(teacher.generate(label, **settings), codes)
    assert captures() == 0


@pytest.mark.parametrize("guided", [False, True])
def test_kernels_are_chosen_for_the_rows_that_run(captures, monkeypatch, guided):
    """Guidance has a second row for every sample, down to the last layer."""
    teacher, label = TEACHERS["LlamaGen"]()
    choose, asked = dispatch.choose, set()

    def noted(op: str, *given, **more):
        asked.add((op, more.get("rows")))
        return choose(op, *given, **more)

    monkeypatch.setattr(dispatch, "choose", noted)
    teacher.generate(label, cfg_scale=2.0 if guided else 1.0, graph=True)
    rows = 4 if guided else 2
    assert {("draw_codes", 2), ("decode_attention", rows), ("add_norm", rows), ("activate", rows)} <= asked
    assert guided or ("decode_attention", 4) not in asked


def test_a_teacher_may_keep_the_codes_it_is_given():
    teacher, label = TEACHERS["one token per group"]()
    advance, given = type(teacher).advance, []

    def keeping(self, state, codes):
        given.append(codes)
        return advance(self, state, codes)

    teacher.__class__ = type("Keeping", (type(teacher),), {"advance": keeping, "graphable": False})
    codes = teacher.generate(label, sampler="greedy")
    assert torch.equal(torch.cat(given, dim=1), codes[:, :-1])


@pytest.mark.parametrize("name", TEACHERS)
def test_autocast_is_left_out(name):
    teacher, condition = TEACHERS[name]()
    codes = teacher.generate(condition, sampler="greedy")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.generate(condition, sampler="greedy"), codes)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_same_codes_on_references(monkeypatch, name):
    teacher, condition = TEACHERS[name]()
    settings = {"sampler": "greedy", "cfg_scale": 2.5}
    codes = teacher.generate(condition, **settings)
    monkeypatch.setenv("DDFAST_BACKEND", "reference")
    assert torch.equal(teacher.generate(condition, **settings), codes)


def test_graphs_need_a_gpu():
    teacher, label = TEACHERS["one token per group"]()
    with pytest.raises(ValueError, match="graph: got True for a teacher on cpu, expected one on a GPU"):
        teacher.generate(label, graph=True)


def test_what_cannot_be_captured_says_so(captures, monkeypatch):
    teacher, label = TEACHERS["one token per group"]()
    monkeypatch.setenv("DDFAST_BACKEND", "draw_codes=reference")
    with pytest.raises(ValueError, match=r"draw_codes would run on its reference.*\(asked for by name\)"):
        teacher.generate(label, graph=True)
    monkeypatch.delenv("DDFAST_BACKEND")
    with pytest.raises(ValueError, match="would run on its reference"):
        copy.deepcopy(teacher).double().generate(label, graph=True)
    teacher.graphable = False
    with pytest.raises(ValueError, match="TransformerTeacher does not say that its steps can be captured"):
        teacher.generate(label, graph=True)


@pytest.fixture
def device(monkeypatch) -> Device:
    """A stand-in for a GPU's streams, events and graphs; it watches the memory of what is captured."""
    device = Device(monkeypatch)

    class OnGPU(decoding.CudaGraphs):
        _streams: dict = {}  # noqa: RUF012

        def __init__(self, _: torch.device) -> None:
            super().__init__(torch.device("cuda", 0))

    class Watched(decoding.Decoding):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
            device.watch([*tensors, *self.inputs.tensors()])

    monkeypatch.setattr(decoding, "CudaGraphs", OnGPU)
    monkeypatch.setattr(decoding, "Decoding", Watched)
    return device


def flow(teacher: Teacher, noise: torch.Tensor, **settings) -> torch.Tensor:
    return teacher.generate(torch.arange(len(noise)) % 3, sampler="flow", noise=noise, graph=True, **settings)


@pytest.mark.parametrize("name", ["one token per group", "growing groups"])
def test_calls_on_two_streams_take_turns(device, name):
    """The second overwrites inputs and cache of a replay that may still run on the first one's stream."""
    teacher, _ = TEACHERS[name]()
    noise = torch.randn(4, 4, 7, 3)
    expected = [teacher.generate(torch.arange(4) % 3, sampler="flow", noise=given) for given in noise]
    streams = [Stream(), Stream()]
    for number, given in enumerate(noise):
        del device.log[:]
        with device.on(streams[number % 2]):
            assert torch.equal(flow(teacher, given), expected[number])
        if number:
            steps = [what for what in device.log if what in ("wait", "copy_", "replay", "clone", "record")]
            assert steps[0] == "wait" and steps[-1] == "record"
            assert {"copy_", "replay", "clone"} <= set(steps[1:-1])
            assert max(map(steps.index, ("wait", "copy_"))) < steps.index("replay") < steps.index("clone")
            assert steps.count("wait") == steps.count("record") == 1
    assert device.captures == 1 + (2 if name == "one token per group" else 3)
    assert device.races == []
    assert {stream for _, stream in device.kept} == set(streams)


def test_threads_share_a_teacher_and_its_graphs(device, monkeypatch):
    """Each on a stream of its own; shapes are captured once each, one at a time, and make room for each other."""
    monkeypatch.setattr(decoding, "KEPT_GRAPHS", 2)
    teacher, _ = TEACHERS["one token per group"]()
    noise = [torch.randn(batch, 7, 3) for batch in (1, 2, 3, 2)]
    expected = [teacher.generate(torch.arange(len(given)) % 3, sampler="flow", noise=given) for given in noise]
    warm_up, wrong = decoding.CudaGraphs.warm_up, []

    def slowly(self, work) -> None:
        warm_up(self, work)
        time.sleep(0.05)

    monkeypatch.setattr(decoding.CudaGraphs, "warm_up", slowly)

    def decode(number: int) -> None:
        try:
            with device.on(Stream()):
                for which in (number, 1, number):
                    if not torch.equal(flow(teacher, noise[which]), expected[which]):
                        wrong.append(which)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert device.races == []


def test_graphs_are_dropped_when_their_replays_have_ended(device, monkeypatch):
    """Their memory is given away at once, and a stream may still be at it."""
    monkeypatch.setattr(decoding, "KEPT_GRAPHS", 1)
    teacher, _ = TEACHERS["one token per group"]()
    with device.on(Stream()):
        for drop in (lambda: flow(teacher, torch.randn(2, 7, 3)), lambda: decoding.release_graphs(teacher)):
            flow(teacher, torch.randn(1, 7, 3))
            del device.log[:]
            drop()
            assert device.log[0] == "synchronize"


def test_a_teacher_is_gone_when_its_replays_have_ended(device):
    teacher, _ = TEACHERS["one token per group"]()
    with device.on(Stream()):
        flow(teacher, torch.randn(1, 7, 3))
        del device.log[:], teacher
        gc.collect()
        assert device.log == ["synchronize"]
