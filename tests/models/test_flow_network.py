import pytest
import torch
from small import LABELS, build

from ddfast.config import update
from ddfast.models.flow_network import FlowNetwork, TransformerFlowNetwork, VelocityHead
from ddfast.models.llamagen.network import LlamaGenFlowNetwork
from ddfast.models.loading import load_student, save_student, student_class, untrained_teacher
from ddfast.models.toy import ToyTeacher
from ddfast.recipes import get_recipe

GROUPS = [(1,) * 7, (1, 3, 5)]
TINY = {"num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32}
FAMILIES = {
    "var-d16": {"depth": 2, "num_classes": 2, "patch_nums": [1, 2, 3]},
    "llamagen-b": {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 2, "block_size": 9},
    "llamagen-xl-t2i": {
        "dim": 32, "n_layer": 2, "n_head": 2, "block_size": 9, "cls_token_num": 6, "caption_dim": 8,
    },
}  # fmt: skip


def shaken(network: FlowNetwork) -> FlowNetwork:
    """Weights large enough that outputs depend visibly on every input."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def family(name: str):
    config = get_recipe(name)
    update(config, {"tokenizer": TINY, "teacher": {"random_weights": True, **FAMILIES[name]}})
    teacher = untrained_teacher(config)
    network = student_class(teacher, "dd2").from_teacher(teacher, head_width=16, head_depth=2)
    condition = teacher.condition_of(torch.tensor([0, 1]))
    return teacher, network, condition


@pytest.fixture(params=[*GROUPS, *FAMILIES], ids=str)
def case(request):
    """Teacher, network with visible weights, condition of two samples."""
    if isinstance(request.param, str):
        teacher, network, condition = family(request.param)
        return teacher, shaken(network), condition
    teacher, _ = build(request.param, trained=True)
    return teacher, shaken(TransformerFlowNetwork.from_teacher(teacher, head_width=16, head_depth=2)), LABELS[:2]


def moved(x: torch.Tensor, token: int) -> torch.Tensor:
    x = x.clone()
    x[:, token] += 1.0
    return x


def test_a_feature_sees_earlier_groups_only(case):
    teacher, network, condition = case
    tokens = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    features = network.features(condition, tokens)
    starts = teacher.group_starts()
    for group, first in enumerate(starts[:-1]):
        changed = (network.features(condition, moved(tokens, first)) - features).abs().amax((0, 2)) > 1e-4
        assert not changed[: starts[group + 1]].any()
        if group + 1 < len(teacher.groups):
            assert changed[starts[group + 1] : starts[group + 2]].any()


def test_a_token_sees_its_own_noise_and_earlier_groups(case):
    teacher, network, condition = case
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    made = network.predict(condition, noise, 0)[1]
    assert made.shape == noise.shape
    level = network.level
    for token in range(teacher.num_tokens):
        changed = (network.predict(condition, moved(noise, token), 0)[1] - made).abs().amax((0, 2)) > 1e-4
        assert changed[token]
        same_or_earlier = level <= level[token]
        same_or_earlier[token] = False
        assert not changed[same_or_earlier].any()


@pytest.mark.parametrize("name", ["var-d16", "llamagen-b", "llamagen-xl-t2i"])
def test_the_backbone_is_the_teachers(name):
    """Its code head reads off clean tokens what the teacher says, LlamaGen's once the table is replaced exactly."""
    teacher, network, condition = family(name)
    codes = torch.randint(teacher.num_codes, (2, teacher.num_tokens))
    expected = teacher.logits(condition, codes)
    if isinstance(network, LlamaGenFlowNetwork):
        table, codebook = teacher.tok_embeddings, teacher.codebook
        assert network.embedding_error() > 0
        network.tok_embeddings = torch.nn.Module()
        network.tok_embeddings.forward = lambda x: table(torch.cdist(x, codebook).argmin(-1))
    torch.testing.assert_close(network.code_logits(network.features(condition, teacher.codebook[codes])), expected)


def test_a_new_heads_velocity_is_zero_and_so_noise_comes_out_as_it_is():
    teacher, _ = build((1,) * 7)
    network = TransformerFlowNetwork.from_teacher(teacher)
    noise = torch.randn(4, 7, 3)
    assert torch.equal(network.generate(LABELS, noise)[0], noise)


def test_the_head_takes_several_draws_per_token():
    head = VelocityHead(8, 3, 16, 2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, features = torch.randn(5, 2, 7, 3), torch.rand(5, 2, 7), torch.randn(2, 7, 8)
    together = head(x, t, features)
    for draw in range(5):
        torch.testing.assert_close(head(x[draw], t[draw], features), together[draw])
    assert (head(x, 1 - t, features) - together).abs().amax() > 1e-2


def test_samples_are_codes_before_the_split(case):
    teacher, network, condition = case
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    continuous = network.generate(condition, noise)[0]
    quantised = network.sample(condition, noise)
    assert torch.equal(network.sample(condition, noise, split=0), continuous)
    distance = torch.cdist(quantised, teacher.codebook).amin(-1)
    assert distance.amax() < 1e-3
    start = teacher.group_starts()[1]
    mixed = network.sample(condition, noise, split=1)
    assert torch.equal(mixed[:, :start], quantised[:, :start])
    assert torch.equal(mixed[:, start:], continuous[:, start:])


def test_more_steps_are_the_teachers(case):
    teacher, network, condition = case
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    count, starts = len(teacher.groups), teacher.group_starts()
    one, three = network.sample(condition, noise), network.sample(condition, noise, **network.settings(3))
    assert network.settings(1) == {}
    assert torch.equal(one[:, : starts[-3]], three[:, : starts[-3]])
    prefix = torch.cdist(one[:, : starts[-3]], teacher.codebook).argmin(-1)
    expected = teacher.generate(condition, sampler="flow", noise=noise, prefix=prefix)
    torch.testing.assert_close(three, teacher.codebook[expected])
    everything = network.sample(condition, noise, **network.settings(count + 1))
    torch.testing.assert_close(everything, teacher.codebook[teacher.generate(condition, sampler="flow", noise=noise)])


def test_errors_say_what_to_do(case):
    teacher, network, condition = case
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    with pytest.raises(ValueError, match=r"t: got 1, expected 0: DD2's generator starts from noise alone"):
        network.predict(condition, noise, 1)
    with pytest.raises(ValueError, match=r"steps: got a pass from point 1; DD2's generator"):
        network.sample(condition, noise, steps=(0, 1))
    with pytest.raises(ValueError, match="x: got shape"):
        network.predict(condition, noise[:, :-1], 0)


def test_saved_and_loaded(case, tmp_path):
    teacher, network, condition = case
    network.time, network.split = 0.8, 1
    save_student(tmp_path / "student.safetensors", network, {}, live=shaken_copy(network))
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim)
    loaded = load_student(tmp_path, teacher)
    assert type(loaded) is type(network)
    assert (loaded.time, loaded.split) == (0.8, 1)
    assert torch.equal(loaded.sample(condition, noise), network.sample(condition, noise))
    live = load_student(tmp_path, teacher, ema=False)
    assert not torch.equal(live.sample(condition, noise), network.sample(condition, noise))


def shaken_copy(network: FlowNetwork) -> dict[str, torch.Tensor]:
    return {name: value + 0.1 * torch.randn_like(value) for name, value in network.state_dict().items()}


def test_starting_from_a_dd1_student_the_features_are_its_own():
    """On noise alone, position i + 1 here is DD1's input token i."""
    teacher, student = build((1,) * 7, trained=True)
    network = TransformerFlowNetwork.from_teacher(teacher)
    network.start_from_student(student)
    noise = torch.randn(4, 7, 3)
    theirs, _ = student.features(LABELS, noise, 0)
    torch.testing.assert_close(network.features(LABELS, noise)[:, 1:], theirs[:, :-1])


def test_the_ar_diffusion_model_of_a_perfect_network_is_the_teachers_flow():
    """With the closed-form velocity in the head's place, Euler's many steps end where the flow sampler does."""
    teacher = ToyTeacher()
    network = TransformerFlowNetwork(teacher, width=16, depth=1, heads=2)
    network.features = lambda condition, tokens: teacher.logits(condition, tokens).log_softmax(-1)

    def closed_form(x, t, features):
        from ddfast.ops import velocity

        return velocity(x, t, features, teacher.codebook)

    network.velocity = closed_form
    label, noise = torch.zeros(500, dtype=torch.int64), torch.randn(500, 4, 2)
    codes = network.sample_ar(label, noise, steps=200)
    expected = teacher.generate(label, sampler="flow", noise=noise)
    assert (codes == expected).double().mean() > 0.98
