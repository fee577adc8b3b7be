"""What a teacher, its decoding and the training of its students ask of the ops."""

from __future__ import annotations

import torch

from ddfast import seeds
from ddfast.models.protocol import Teacher
from ddfast.ops import codebook_posterior, nearest_code, noise


def work(teacher: Teacher, samples: int) -> None:
    """Call all of them once, for so many samples."""
    device, shape = teacher.codebook.device, (teacher.num_tokens, teacher.code_dim)
    index = torch.arange(samples, dtype=torch.int64, device=device)
    condition = teacher.condition_of(index % teacher.num_conditions)
    eps = noise(0, index, shape)
    generator = seeds.generator(0, device)
    with torch.no_grad():
        codes = teacher.generate(condition, sampler="flow", noise=eps, graph=False)
        teacher.generate(condition, sampler="multinomial", generator=generator, graph=False)
        nearest_code(eps, teacher.codebook)
        log_probs = teacher.log_probs(condition, codes, defaults=teacher.defaults)
    draws = eps.expand(2, *eps.shape).clone().requires_grad_()  # as DD2's default
    t = torch.linspace(0.05, 0.95, draws[..., 0].numel(), dtype=torch.float32, device=device).view(draws.shape[:-1])
    mean = codebook_posterior(draws, t, log_probs, teacher.codebook)
    torch.autograd.grad(mean.sum(), draws)
