import copy
import json
import signal

import pytest
import torch
from checkpointed import last_step, states

from ddfast.config import AdaptConfig, DD2Config, MatchConfig, TrainConfig, TuneConfig, update
from ddfast.distill import losses
from ddfast.distill.batch import Batch, Part
from ddfast.distill.dd2 import Adaptation, Matching, Tuning
from ddfast.distill.method import ExponentialMovingAverage, Roles
from ddfast.distill.monitor import Watcher
from ddfast.distill.stages import adapt, match, new_network, tune
from ddfast.distill.tracking import METRICS
from ddfast.distill.trainer import ALARM_CHECKPOINT, from_noise, optimise
from ddfast.errors import DDFastError
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.loading import untrained_teacher
from ddfast.models.toy import ToyTeacher
from ddfast.ops import codebook_posterior, flow_sample, nearest_code
from ddfast.recipes import get_recipe

SMALL = {"batch_size": 16, "warmup": 2, "log_every": 2, "checkpoint_every": 3}


def toy_network(seed: int = 0, std: float = 0.0, **sizes: object) -> TransformerFlowNetwork:
    torch.manual_seed(seed)
    network = TransformerFlowNetwork(ToyTeacher(), width=16, depth=1, heads=2, head_width=16, head_depth=1, **sizes)
    if std:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return network


def toy_matching(**settings: object) -> Matching:
    student, guidance = toy_network(0, 0.3), toy_network(1, 0.3)
    config = MatchConfig(**{**SMALL, "start_iterations": 0, "anchor_weight": 0.0, "lookahead_weight": 0.0, **settings})
    return Matching(Roles(student=student, teacher=student.teacher, guidance=guidance), config)


def toy_batch(size: int = 16, seed: int = 3) -> Batch:
    return from_noise(ToyTeacher())(Part.whole(size, torch.Generator().manual_seed(seed)))


def test_losses_by_hand():
    x, real, fake = torch.randn(4, 3, 2, requires_grad=True), torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2)
    velocity, target = torch.randn(2, 5, 4, 3, 2)
    expected = sum((velocity[i] - target[i]).pow(2).sum() for i in range(5)) / (5 * 4 * 3)
    torch.testing.assert_close(losses.velocity_distance(velocity, target), expected)
    (gradient,) = torch.autograd.grad(losses.score_distance_kl(x, real, fake), x)
    torch.testing.assert_close(gradient, (fake - real).mean(0) / 12)
    by_hand = sum(((real[i] - fake[i]) * (fake[i] - x)).sum() for i in range(5)) / (5 * 4 * 3)
    torch.testing.assert_close(losses.score_distance_sid(x, real, fake, 1.0), by_hand)
    whole = losses.score_distance_sid(x, real, fake, 0.0) - losses.score_distance_sid(x, real, fake, 1.0)
    torch.testing.assert_close(whole, (real - fake).pow(2).sum(-1).mean())
    logits, log_probs = torch.randn(4, 3, 6), torch.randn(4, 3, 6).log_softmax(-1)
    log_probs[..., 2] = -torch.inf
    by_hand = -(log_probs.exp() * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses.next_token_divergence(logits, log_probs), by_hand)


both_scores = pytest.mark.parametrize("fake_score", ["codes", "velocity"])


@both_scores
@pytest.mark.parametrize("form", ["kl", "sid"])
def test_the_generators_step_leaves_no_gradient_in_the_guidance_network(form, fake_score):
    method = toy_matching(form=form, fake_score=fake_score)
    loss, _ = method.step("student", toy_batch(), Part.whole(16, torch.Generator().manual_seed(0)))
    loss.backward()
    assert all(parameter.grad is None for parameter in method.roles.guidance.parameters())
    assert all(parameter.requires_grad for parameter in method.roles.guidance.parameters())
    head = method.student.velocity_head
    assert head.output.weight.grad.abs().amax() > 0
    assert method.student.position_embedding.grad.abs().amax() > 0
    method.student.zero_grad(set_to_none=True)
    method.step("guidance", toy_batch(), Part.whole(16, torch.Generator().manual_seed(0)))[0].backward()
    assert all(parameter.grad is None for parameter in method.student.parameters())


@both_scores
@pytest.mark.parametrize("prefix", ["codes", "continuous"])
@pytest.mark.parametrize("form", ["kl", "sid"])
def test_prefixes_take_no_gradient(form, prefix, fake_score):
    """A token's gradient is that of its own term: no other token's term reaches it through the prefix."""
    method = toy_matching(form=form, prefix=prefix, fake_score=fake_score)
    teacher = method.roles.teacher
    label = torch.zeros(8, dtype=torch.int64)
    x = torch.randn(8, 4, 2, requires_grad=True)

    def distance(tokens: torch.Tensor) -> torch.Tensor:
        made = method._prefix(tokens)
        log_probs = teacher.log_probs(label, made)
        part = Part.whole(len(tokens), torch.Generator().manual_seed(1))
        return method._score_distance(tokens, made, log_probs, label, part)[0]

    (whole,) = torch.autograd.grad(distance(x), x)
    for token in range(4):
        own = torch.arange(4)[:, None] == token
        (alone,) = torch.autograd.grad(distance(torch.where(own, x, x.detach())), x)
        torch.testing.assert_close(alone[:, token], whole[:, token])
        assert whole[:, token].abs().amax() > 0


def test_csd_is_the_gradient_of_the_divergence():
    """One token, frozen generator, its exact score in the guidance network's place: CSD's KL form is the gradient of
    KL(generator || teacher), averaged over flow times, in a float64 finite difference."""
    torch.manual_seed(0)
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    log_probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    atoms = torch.randn(3, 2, dtype=torch.float64)  # a generator that makes each of three points equally often
    even = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    t, grid = 0.6, torch.linspace(-6, 6, 241, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)

    def log_density(x: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        distance = (x[:, None] - (1 - t) * codes).square().sum(-1)
        return (weights - distance / (2 * t**2)).logsumexp(-1) - torch.log(torch.tensor(2 * torch.pi * t**2))

    def divergence(codes: torch.Tensor) -> torch.Tensor:
        ours = log_density(points, even, codes)
        return (ours.exp() * (ours - log_density(points, log_probs, codebook))).sum() * (grid[1] - grid[0]) ** 2

    numeric = torch.zeros_like(atoms)
    for i in range(3):
        for k in range(2):
            step = torch.zeros_like(atoms)
            step[i, k] = 1e-4
            numeric[i, k] = (divergence(atoms + step) - divergence(atoms - step)) / 2e-4
    # E over the noise by quadrature on the grid: every atom's x_t has the density N((1-t) atom, t^2).
    analytic = torch.zeros_like(atoms)
    for i, atom in enumerate(atoms):
        weight = log_density(points, torch.zeros(1, dtype=torch.float64), atom[None]).exp()[:, None]
        real = codebook_posterior(points, t, log_probs, codebook)
        fake = codebook_posterior(points, t, even, atoms)
        # score difference = (fake - real) (1-t) / t^2, and dx_t / dx = 1-t
        analytic[i] = (weight * (fake - real)).sum(0) * (grid[1] - grid[0]) ** 2 * ((1 - t) / t) ** 2 / 3
    torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=1e-6)
    x = atoms.clone().requires_grad_()
    noisy = (1 - t) * x + t * torch.randn(200_000, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        real = codebook_posterior(noisy, t, log_probs.expand(3, 3), codebook)
        fake = codebook_posterior(noisy, t, even.expand(3, 3), atoms)
    losses.score_distance_kl(x, real, fake).backward()
    torch.testing.assert_close(x.grad * ((1 - t) / t) ** 2, numeric, rtol=0.05, atol=0.01)


def test_a_guidance_network_of_codes_knows_the_generators_law():
    """Trained on a frozen generator's codes, it tells how often each is made given those before it."""
    method = toy_matching(fake_score="codes")
    guidance, student, teacher = method.roles.guidance, method.student, method.roles.teacher
    optimizer = torch.optim.AdamW(guidance.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(300):
        optimizer.zero_grad()
        method.step("guidance", toy_batch(256, seed=step), Part.whole(256, torch.Generator()))[0].backward()
        optimizer.step()
    batch = toy_batch(50_000, seed=1000)
    with torch.no_grad():
        x, _ = student.generate(batch.condition, batch.noise)
        codes = nearest_code(x, student.codebook)
        law = guidance.code_logits(guidance.features(batch.condition, teacher.embed(codes))).softmax(-1)
    first = torch.bincount(codes[:, 0], minlength=8) / len(codes)
    torch.testing.assert_close(law[0, 0], first, atol=0.02, rtol=0)
    given = codes[:, 0] == first.argmax()  # of the second token, given the likeliest first one
    second = torch.bincount(codes[given, 1], minlength=8) / given.sum()
    torch.testing.assert_close(law[given, 1].mean(0), second, atol=0.03, rtol=0)


def test_the_anchor_is_the_teachers_flow_given_ones_own_prefix():
    method = toy_matching(score_weight=0.0, anchor_weight=1.0, start_iterations=1)
    batch, teacher = toy_batch(), method.roles.teacher
    loss, logged = method.step("start", batch, Part.whole(len(batch.noise), torch.Generator()))
    x = method.student.generate(batch.condition, batch.noise)[0]
    codes = nearest_code(x, teacher.codebook)
    target = torch.stack(
        [
            flow_sample(teacher.log_probs(batch.condition, codes)[:, i], batch.noise[:, i], teacher.codebook)[1]
            for i in range(4)
        ],
        dim=1,
    )
    nearest = (torch.cdist(teacher.codebook, teacher.codebook) + torch.eye(8) * 9).amin(-1)
    width = 0.5 * nearest.median()
    by_hand = width * torch.log(1 + (x - target).norm(dim=-1).square() / width**2)
    torch.testing.assert_close(loss, by_hand.mean())
    assert logged.keys() == {"anchor"}


def test_turns():
    settings = {"start_iterations": 2, "anchor_weight": 1.0, "guidance_first": 3, "guidance_updates": 2}
    settings |= {"iterations": 2, "align_iterations": 2, "later_iterations": 1, "later_guidance_updates": 1}
    method = toy_matching(**settings)
    turns = [method.phase(step) for step in range(method.total)]
    g, s = "guidance", "student"
    assert turns == ["start", "start", g, g, g, g, g, s, g, g, s, g, g, g, s]
    assert [step for step in range(method.total) if method.starts_from_average(step)] == [11]
    assert method.guidance_updates == turns.count(g)
    assert method.student_updates == turns.count("start") + turns.count(s)
    alone = toy_matching(**settings, score_weight=0.0)
    assert {alone.phase(step) for step in range(alone.total)} == {"start"}
    assert alone.total == method.student_updates  # the control has as many of the generator's updates


def test_every_network_has_its_own_learning_rate():
    method = toy_matching(
        decay=False,
        learning_rate=1e-3,
        warmup=4,
        guidance_learning_rate=8e-3,
        guidance_warmup=8,
        first_learning_rate=3e-4,
    )
    assert [method.learning_rate("student", update) for update in range(5)] == pytest.approx(
        [3e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]
    )
    started = toy_matching(start_iterations=100, start_learning_rate=5e-3, anchor_weight=1.0, warmup=10)
    assert started.learning_rate("start", 9) == pytest.approx(5e-3)
    assert started.learning_rate("start", 99) < 1e-5
    assert started.learning_rate("student", 109) == pytest.approx(started.config.learning_rate)  # its own schedule
    assert method.learning_rate("guidance", 3) == pytest.approx(4e-3)
    assert method.learning_rate("guidance", 100) == 8e-3


def test_both_targets_of_stage_1_have_the_same_mean():
    """Noise minus token is the closed form plus what one draw cannot know: on average, the same gradient."""

    def gradient(loss: str) -> torch.Tensor:
        network = toy_network(0, 0.2)
        teacher = network.teacher
        method = Tuning(Roles(student=network, teacher=teacher), TuneConfig(loss=loss, draws=8, **SMALL))
        batch = from_noise(teacher, decoding=teacher.defaults)(Part.whole(20_000, torch.Generator().manual_seed(0)))
        method.step("full", batch, Part.whole(len(batch.noise), torch.Generator().manual_seed(1)))[0].backward()
        return network.velocity_head.output.bias.grad

    torch.testing.assert_close(gradient("monte_carlo"), gradient("gts"), rtol=0.02, atol=0.02)


def test_the_head_alone_comes_first():
    network = toy_network(0, 0.2)
    method = Tuning(
        Roles(student=network, teacher=network.teacher), TuneConfig(iterations=5, head_iterations=2, **SMALL)
    )
    assert [method.phase(step) for step in range(5)] == ["head", "head", "full", "full", "full"]
    batch = from_noise(ToyTeacher(), decoding=network.teacher.defaults)(Part.whole(8, torch.Generator()))
    method.step("head", batch, Part.whole(len(batch.noise), torch.Generator()))[0].backward()
    assert network.input.weight.grad is None
    assert network.velocity_head.input.weight.grad is not None
    method.step("full", batch, Part.whole(len(batch.noise), torch.Generator()))[0].backward()
    assert network.input.weight.grad is not None


def test_stage_1_learns_the_teacher(tmp_path):
    """The AR-diffusion model's samples come nearer to the exact joint."""
    config = TrainConfig()
    update(config.dd2.tune, {"iterations": 300, "batch_size": 128, "learning_rate": 4e-3, "warmup": 20})
    torch.manual_seed(0)
    network = TransformerFlowNetwork(ToyTeacher(), width=32, depth=2, heads=2, head_width=32, head_depth=1)
    teacher = network.teacher
    label, noise = torch.zeros(20_000, dtype=torch.int64), torch.randn(20_000, 4, 2)
    before = teacher.total_variation(network.sample_ar(label, noise))
    tune(config, teacher, network, None, tmp_path)
    after = teacher.total_variation(network.sample_ar(label, noise))
    assert after < 0.75 * before
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"tuning"}
    assert lines[-1]["full_loss"] < 0.5 * lines[0]["full_loss"]


def matching_config(**settings: object) -> TrainConfig:
    config = TrainConfig()
    shared = {"iterations": 4, "start_iterations": 3, "guidance_first": 2, "align_iterations": 2, "later_iterations": 2}
    update(config.dd2.match, {**SMALL, **shared, "watch_every": 5, **settings})
    return config


@pytest.mark.parametrize(("form", "optimizer"), [("kl", "muon"), ("sid", "adamw")])
def test_interrupted_and_resumed_is_the_same_run(form, optimizer, tmp_path):
    config = matching_config(form=form, optimizer=optimizer)

    def run(out, progress=None):
        student, guidance = toy_network(0, 0.2), toy_network(1, 0.2)
        live = match(config, student.teacher, student, guidance, out, progress=progress)
        return student.state_dict(), guidance.state_dict(), live

    whole = run(tmp_path / "whole")
    for stop_at in (2, 8, 17):

        def stop(done, total, text, at=stop_at):
            if done == at:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop)
        assert last_step(tmp_path / "parts") == stop_at
    resumed = run(tmp_path / "parts")
    for ours, theirs in zip(whole, resumed, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    logs = [(tmp_path / name / METRICS).read_text().splitlines() for name in ("whole", "parts")]
    plain = [
        [{k: v for k, v in json.loads(line).items() if not k.endswith("per_second")} for line in log] for log in logs
    ]
    assert plain[0] == plain[1]


def test_every_step_is_logged(tmp_path):
    student, guidance = toy_network(0, 0.2), toy_network(1, 0.2)
    match(matching_config(log_every=6, watch_every=6), student.teacher, student, guidance, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    expected = {"guidance_loss", "guidance_gradient_norm", "student_loss", "student_gradient_norm", "score_distance"}
    expected |= {"score_discrepancy_t0.125", "score_discrepancy_t0.875", "anchor", "lookahead"}
    expected |= {"teacher_nll", "diversity", "ema_distance", "student_learning_rate", "guidance_learning_rate"}
    assert expected <= set(lines[1])


def test_a_checkpoint_of_another_stage_is_left_alone(tmp_path):
    config = matching_config()
    update(config.dd2.tune, {**SMALL, "iterations": 3})
    network = toy_network(0, 0.2)
    tune(config, network.teacher, network, None, tmp_path)
    assert {state["stage"] for state in states(tmp_path)} == {"tuning"}
    student = toy_network(0, 0.2)
    match(config, network.teacher, student, network, tmp_path)
    assert {state["stage"] for state in states(tmp_path)} == {"matching"}


def test_collapse_raises_an_alarm_and_keeps_the_checkpoint(tmp_path, capsys):
    student, guidance = toy_network(0), toy_network(1)
    with torch.no_grad():  # noise times 0: every sample is the same
        student.velocity_head.output.bias.zero_()
    student.generate = lambda condition, noise: (0 * noise + student.velocity_head.output.bias, noise)
    config = matching_config(lookahead_weight=0.0)
    match(config, student.teacher, student, guidance, tmp_path)
    said = capsys.readouterr().err
    assert "warning: matching, step 5: the samples' diversity collapsed to" in said
    assert said.count("warning") == 1
    assert json.loads((tmp_path / ALARM_CHECKPOINT / "state.json").read_text())["step"] == 3


def test_divergence_raises_an_alarm():
    student = toy_network(0, 0.3)
    watcher = Watcher(student, student.teacher)
    average = ExponentialMovingAverage(student, 0.9)
    assert watcher.look(average)[0]["ema_distance"] == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        student.velocity_head.output.bias += 20.0
    seen, alarm = watcher.look(average)
    assert seen["ema_distance"] > 1
    assert alarm


def test_the_watcher_leaves_the_live_weights():
    student = toy_network(0, 0.3)
    average = ExponentialMovingAverage(toy_network(5, 0.3), 0.9)
    before = copy.deepcopy(student.state_dict())
    Watcher(student, student.teacher).look(average)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_adaptation_replaces_the_table(tmp_path):
    config = get_recipe("llamagen-b")
    sizes = {"dim": 32, "n_layer": 1, "n_head": 2, "num_classes": 2, "block_size": 9, "top_k": 0, "cfg_scale": 1.0}
    vq = {"num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32}
    update(config, {"teacher": {"random_weights": True, **sizes}, "tokenizer": vq})
    small = {"precision": "float32", "batch_size": 64, "log_every": 10, "warmup": 5, "learning_rate": 3e-3}
    update(config.dd2, {"head_width": 16, "head_depth": 1, "adapt": {**small, "iterations": 160, "fit_iterations": 80}})
    teacher = untrained_teacher(config)
    torch.manual_seed(0)
    for name, parameter in teacher.named_parameters():
        if "tokenizer" not in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)  # a teacher that listens to its tokens
    network = new_network(config, teacher)
    result = adapt(config, teacher, network, tmp_path)
    lost_before = result["before"]["adapted"] - result["before"]["teacher"]
    lost_after = result["after"]["adapted"] - result["after"]["teacher"]
    assert lost_after < 0.3 * lost_before
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines[0]["stage"] == "adaptation"
    fitted, done = lines[7]["adapted_nll"], lines[-1]["adapted_nll"]
    assert result["after"]["adapted"] < fitted < result["before"]["adapted"]
    assert done == pytest.approx(result["after"]["adapted"])
    assert lines[7]["fit_loss"] < 0.7 * lines[0]["fit_loss"]
    with pytest.raises(TypeError, match="expected a network that looks tokens up"):
        Adaptation(Roles(student=toy_network(), teacher=ToyTeacher()), AdaptConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: got 'sgd', expected adamw or muon"),
        ({"form": "wgan"}, "form: got 'wgan', expected sid or kl"),
        ({"prefix": "soft"}, "prefix: got 'soft', expected codes or continuous"),
        ({"fake_score": "exact"}, "fake_score: got 'exact', expected codes or velocity"),
        ({"guidance_start": "dd1"}, "guidance_start: got 'dd1', expected stage1, teacher or scratch"),
        ({"score_weight": 0.0, "anchor_weight": 0.0, "lookahead_weight": 0.0}, "score_weight: got 0.0"),
        ({"anchor_weight": 0.0, "lookahead_weight": 0.0}, "start_iterations: got 1200, expected 0 without anchor"),
    ],
)
def test_configuration_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MatchConfig(**settings)


def test_a_generator_that_matches_needs_guidance():
    student = toy_network()
    with pytest.raises(ValueError, match="guidance: got None"):
        Matching(Roles(student=student, teacher=student.teacher), MatchConfig())
    with pytest.raises(ValueError, match=r"time: got 1.5, expected in \(0, 1\]"):
        DD2Config(time=1.5)


@pytest.mark.parametrize("phase", ["student", "guidance"])
def test_diverged_weights_end_the_training_with_its_name(tmp_path, phase):
    """Ops refuse what such weights make before there is a loss to look at."""
    method = toy_matching(iterations=2, guidance_first=2 if phase == "guidance" else 0)
    method.student.velocity_head.output.weight.data.fill_(torch.nan)
    with pytest.raises(DDFastError, match=r"matching: (step 0 stopped: x: got NaN|the loss became nan).*learning rate"):
        optimise(method, method.config, from_noise(ToyTeacher()), tmp_path, stage="matching", seed=0, identity="i")
