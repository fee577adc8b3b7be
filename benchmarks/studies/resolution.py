"""What one sample of a full-size VAR or LlamaGen at higher resolution takes: a table of docs/notes/resolution.md.

Weights are random. A call is a process of its own; with `/usr/bin/time -v` in front, its peak is the system's.

python benchmarks/studies/resolution.py var-d16 --pixels 512       # one step of DD1's student, then the image
python benchmarks/studies/resolution.py llamagen-b --pixels 384
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from ddfast.distill.stages import untrained_student
from ddfast.models.loading import untrained_teacher
from ddfast.ops import noise
from ddfast.recipes import get_recipe
from ddfast.trajectories.memory import image_bytes, largest_sampling_batch, sample_bytes

VAR_SCALES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--pixels", type=int, default=512)
    options = parser.parse_args()
    config = get_recipe(options.recipe)
    if options.recipe.startswith("var"):
        config.teacher.patch_nums = VAR_SCALES[options.pixels]
    else:
        config.teacher.block_size = (options.pixels // 16) ** 2
    teacher = untrained_teacher(config)
    student = untrained_student(config, teacher)
    began = _peak()
    eps = noise(0, torch.arange(1), (teacher.num_tokens, teacher.code_dim), "cpu")
    start = time.perf_counter()
    made = student.sample(torch.zeros(1, dtype=torch.int64), eps)
    seconds, sampled = time.perf_counter() - start, _peak()
    start = time.perf_counter()
    image = teacher.decode(made)
    print(
        f"{options.recipe}, {options.pixels} pixels, {teacher.num_tokens} tokens, image {list(image.shape[1:])}: "
        f"networks {began / 2**20:.0f} MiB; one step {seconds:.1f} s, + {(sampled - began) / 2**20:.0f} MiB; "
        f"image {time.perf_counter() - start:.1f} s, + {(_peak() - sampled) / 2**20:.0f} MiB more",
        flush=True,
    )
    batch = largest_sampling_batch(teacher, student, decodes=False, images=True)
    print(f"counted for an image {image_bytes(teacher) / 2**20:.0f} MiB, batch of {batch} in the memory free")
    print(f"counted for a sequence of the teacher {sample_bytes(teacher) / 2**20:.0f} MiB")


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
