"""What the closed-form score costs of a generator's update in DD2 (stage 2).

One update: the generator's pass over the noise, the teacher-forced pass with guidance, the guidance network's, the
closed form at m noisy versions of every token with its backward, and the generator's backward. The score is
`codebook_posterior` forward and backward: per noisy token 7 V d multiply-adds and V exponentials, against about
6 P multiply-adds per token for a pass with backward through P parameters.
"""

import pytest
import torch
from compare import side_by_side

from ddfast.config import update
from ddfast.distill.batch import Part
from ddfast.distill.dd2 import Matching
from ddfast.distill.method import Roles
from ddfast.distill.stages import new_network
from ddfast.distill.trainer import from_noise
from ddfast.models.loading import untrained_teacher
from ddfast.ops import codebook_posterior, nearest_code
from ddfast.ops.forms import add_noise
from ddfast.recipes import get_recipe

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the published sizes need a GPU")
CASES = [
    pytest.param("digits", 128, id="digits"),
    pytest.param("var-d16", 32, id="var-d16", marks=on_gpu),
    pytest.param("llamagen-l", 128, id="llamagen-l", marks=on_gpu),
]


@pytest.mark.parametrize(("recipe", "batch_size"), CASES)
def test_score_of_an_update(benchmark, recipe, batch_size):
    config = get_recipe(recipe)
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe != "digits":
        update(config, {"teacher": {"random_weights": True, "dtype": "bfloat16"}})
    teacher = untrained_teacher(config).to(config.device)
    # Both forms cost the closed form once; SiD alone differentiates it.
    config.dd2.match.form, config.dd2.match.start_iterations = "sid", 0
    student, guidance = new_network(config, teacher), new_network(config, teacher)
    method = Matching(Roles(student=student, teacher=teacher, guidance=guidance), config.dd2.match)
    batch = from_noise(teacher)(Part.whole(batch_size, torch.Generator().manual_seed(0)))
    reduced = config.dd2.match.precision == "bfloat16"

    def generator_update() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(config.device, torch.bfloat16, enabled=reduced):
            loss, _ = method.step("student", batch, Part.whole(batch_size, torch.Generator().manual_seed(1)))
        loss.backward()

    with torch.no_grad():
        codes = nearest_code(student.generate(batch.condition, batch.noise)[0], student.codebook)
        log_probs = teacher.log_probs(batch.condition, codes)
    tokens = student.codebook[codes]
    draws = config.dd2.match.draws
    t = torch.rand(draws, *codes.shape, device=codes.device) * 0.9 + 0.05
    x = add_noise(tokens, torch.randn(draws, *tokens.shape, device=codes.device), t).requires_grad_()

    def closed_form(backend: str) -> torch.Tensor:
        x.grad = None
        x0 = codebook_posterior(x, t, log_probs, student.codebook, backend=backend)
        x0.sum().backward()
        return x0.detach()

    torch.testing.assert_close(closed_form("auto"), closed_form("reference"), rtol=1e-3, atol=1e-3)
    providers = {
        "ddfast": lambda: closed_form("auto"),
        "eager": lambda: closed_form("reference"),
        "the generator's update, whole": generator_update,
    }
    side_by_side(benchmark, providers, recipe=recipe, batch=batch_size, draws=draws)
