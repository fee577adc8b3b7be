"""What ddfast asks of a teacher, and the one generation loop that every teacher shares.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ddfast.models.attention import group_levels
from ddfast.models.autoregressive import AutoRegressive, Condition, SamplingDefaults, condition_size, on_device
from ddfast.models.decoding import Inputs, Plan, Sampler, check_decoded, decode
from ddfast.models.inputs import (
    as_codes,
    as_embeddings,
    as_uniform,
    check_labels,
    check_noise,
    check_options,
    known,
)
from ddfast.ops import filter_logits
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS


class Teacher(AutoRegressive):
    """An auto-regressive model over the codes of a VQ codebook.

    A subclass sets the attributes of `AutoRegressive` and the two below, and implements `begin`, `advance` and `logits`
    (and `encode` and `decode` if it has an image tokenizer, or `texts` if its codes are text); sampling, guidance and
    filtering are inherited.

    Attributes:
        num_classes: number of labels; the label `num_classes` stands for "no condition".
        defaults: sampling settings that `generate` uses where the caller gives none.
    """

    num_classes: int
    defaults: SamplingDefaults

    # What a teacher implements -----------------------------------------------------------------------------------

    @abstractmethod
    def logits(self, condition: Condition, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        """Teacher-forced logits of every position, unguided; position i sees earlier groups only.

        A pass of training, which follows autocast; `generate` does not.

        Args:
            condition: int64 [B], or text.
            codes: int64 [B, N], or their embeddings [B, N, D].
            unconditional: leave the condition out.

        Returns:
            float32 [B, N, V].
        """

    def encode(self, images: Any) -> Tensor:
        """Images to codes int64 [B, N].

        Args:
            images: float [B, C, H, W] in [0, 1], uint8, NumPy's or PIL's (`ddfast.models.inputs.as_images`).
        """
        raise TypeError(f"{type(self).__name__} has no image tokenizer")

    def decode(self, codes: Any, *, clamp: bool = True) -> Tensor:
        """Codes [B, N] of any integer type, or embeddings [B, N, D], to images [B, C, H, W] in [0, 1].

        With `clamp=False`, the decoder's raw output in [-1, 1] scale.
        """
        raise TypeError(f"{type(self).__name__} has no image tokenizer")

    @property
    def has_decoder(self) -> bool:
        """Whether codes become images: `decode` is overridden."""
        return type(self).decode is not Teacher.decode

    def texts(self, codes: Any) -> list[str]:
        """What codes [B, N] of any integer type, or embeddings [B, N, D], say, where they are of text."""
        raise TypeError(f"{type(self).__name__} makes no text")

    @classmethod
    def makes_text(cls) -> bool:
        """Whether codes are text: `texts` is overridden."""
        return cls.texts is not Teacher.texts

    def group_cfg_scale(self, cfg_scale: float, group: int) -> float:
        """Factor of guidance in one group, in `filter_logits`' sense (1: none); the same for all unless overridden."""
        return cfg_scale

    @property
    def num_conditions(self) -> int:
        """How many conditions training pairs cycle through: the classes, or the captions of a text teacher."""
        return self.num_classes

    def condition_of(self, index: Tensor) -> Condition:
        """The condition that index int64 [B] (0 .. num_conditions - 1) stands for: the label, or a caption."""
        return index

    # What every teacher inherits ---------------------------------------------------------------------------------

    def tokens(self, codes: Any, batch: int | None = None, *, waits: bool = True) -> Tensor:
        """Embeddings float32 [B, N, D] of whole sequences, from codes [B, N] or embeddings; what does not fit raises.

        Args:
            codes: as `decode` takes them.
            batch: B; None: any.
            waits: look at the values of codes also where that waits for a GPU.
        """
        return as_embeddings(codes, self.codebook, (batch, self.num_tokens), waits=waits)

    def check_condition(self, condition: Condition) -> None:
        """Raise `TypeError`/`ValueError` unless `condition` holds labels this teacher knows."""
        check_labels(condition, self.num_classes)

    def check_training_condition(self, condition: Condition) -> None:
        """`check_condition` where it does not wait for a GPU: a training step asks at every pass."""
        first = condition[0] if isinstance(condition, tuple) and condition else condition
        if not isinstance(first, Tensor) or known(first, waits=False):
            self.check_condition(condition)

    def accepted(self, condition: Condition) -> Condition:
        """The condition of a generation on the teacher's device, checked; a family may take more than labels."""
        self.check_condition(condition)
        return on_device(condition, self.codebook.device)

    def filters(self, *, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
        """Settings of `filter_logits`; a family translates what its official code gives a meaning of its own."""
        return {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def guidance_and_filters(
        self,
        groups: range | None = None,
        *,
        cfg_scale: float | None = None,
        cfg_interval: int = -1,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
    ) -> tuple[list[float], dict[str, Any]]:
        """What a decoding of some groups (None: all) asks of `filter_logits`.

        Args: as of `generate`.

        Returns:
            the scale of guidance of every group (1: none), and the other settings by name.
        """
        defaults = self.defaults
        filters = self.filters(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
        )
        cfg_scale = defaults.cfg_scale if cfg_scale is None else float(cfg_scale)
        groups = range(len(self.groups)) if groups is None else groups
        scales = [self.group_cfg_scale(cfg_scale, group) for group in groups]
        if cfg_interval >= 0:
            scales[cfg_interval + 2 :] = [1.0] * len(scales[cfg_interval + 2 :])
        return scales, filters

    def log_probs(
        self,
        condition: Condition,
        codes: Tensor,
        *,
        filtered: bool = True,
        defaults: SamplingDefaults | None = None,
    ) -> Tensor:
        """Teacher-forced log-probabilities [B, N, V] of the distribution that the teacher samples from.

        Guidance and temperature are those of `defaults` (None: the teacher's); with `filtered=False` top-k and top-p
        are left out, so every code keeps a finite log-probability (a likelihood of foreign samples needs that).
        """
        defaults = defaults or self.defaults
        top_k, top_p = (defaults.top_k, defaults.top_p) if filtered else (0, 1.0)
        scales, settings = self.guidance_and_filters(
            cfg_scale=defaults.cfg_scale, temperature=defaults.temperature, top_k=top_k, top_p=top_p
        )
        logits = self.logits(condition, codes)
        if all(scale == 1.0 for scale in scales):
            return filter_logits(logits, **settings)
        level = group_levels(self.groups, logits.device)
        return filter_logits(
            logits,
            uncond=self.logits(condition, codes, unconditional=True),
            cfg_scale=torch.tensor(scales, dtype=torch.float32, device=logits.device)[level][None],
            **settings,
        )

    def generate(
        self,
        condition: Condition,
        *,
        sampler: Sampler = "multinomial",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
        cfg_scale: float | None = None,
        cfg_interval: int = -1,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        prefix: Tensor | None = None,
        stop: int | None = None,
        steps: int = DEFAULT_STEPS,
        solver: str = DEFAULT_SOLVER,
        graph: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """Decode images token group by token group, with guidance rows in the same forward passes.

        Args:
            condition: int64 [B], or text; on any device.
            sampler: "multinomial" draws with `generator`; "greedy" takes the most likely code; "flow" integrates
                every token's closed-form flow from `noise`, docs/method.md section 6 (DD1: trajectories): the
                deterministic map that DD1
                distils, with the same distribution as "multinomial".
            noise: float32 [B, N, D], for the sampler "flow".
            generator: randomness of "multinomial": one uniform number per token, whether or not it is decoded.
            uniform: these numbers, [B, N] in [0, 1), in the generator's place: a sample's draws are then its own,
                whatever the batch.
            cfg_scale, top_k, top_p, temperature: None takes the value of `defaults`. What a scale means in a group is
                the teacher's to say (`group_cfg_scale`); where no group is guided, half of the work is saved.
            cfg_interval: guide only the first group decoded and this many + 1 after it; negative guides all.
            prefix: int64 [B, m], codes that are already decided; m ends a group.
            stop: decode up to this token (it ends a group) instead of all n.
            steps, solver: of the sampler "flow", as in `ddfast.ops.flow_sample`.
            graph: replay every step as a CUDA graph, captured in the first call with these shapes and settings and kept
                with its memory (`ddfast.models.decoding.release_graphs`). The codes are the same. None: on a GPU, from
                the second such call on, where the teacher allows it and kernels do the sampling.
            options: what else the teacher's `begin` takes.

        Returns:
            int64 [B, stop], the prefix included.

        Raises:
            TypeError: an argument has a wrong type, or is none of this teacher's.
            ValueError: an argument is out of range or has a wrong shape; noise is missing or not wanted.
        """
        check_options(self.begin, options, inspect.signature(Teacher.generate).parameters)
        condition = self.accepted(condition)
        batch = condition_size(condition)
        starts, device = self.group_starts(), self.codebook.device
        length = 0
        if prefix is not None:
            length = prefix.shape[1] if isinstance(prefix, Tensor) and prefix.ndim == 2 else 0
            prefix = as_codes(prefix, self.num_codes, (batch, length), "prefix").to(device)
        stop = self.num_tokens if stop is None else stop
        if sampler not in ("multinomial", "greedy", "flow"):
            raise ValueError(f"sampler: got {sampler!r}, expected 'multinomial', 'greedy' or 'flow'")
        if (sampler == "flow") != (noise is not None):
            raise ValueError(f"noise: got {'a tensor' if noise is not None else None} with sampler {sampler!r}")
        if noise is not None:
            noise = check_noise(noise, (batch, self.num_tokens, self.code_dim)).to(device)
        if uniform is not None:
            if sampler != "multinomial" or generator is not None:
                what = "a generator too" if sampler == "multinomial" else f"sampler {sampler!r}"
                raise ValueError(f"uniform: got a tensor with {what}; it is for 'multinomial', in a generator's place")
            uniform = as_uniform(uniform, (batch, self.num_tokens)).to(device)
        for name, value in (("prefix", length), ("stop", stop)):
            if value not in starts:
                raise ValueError(f"{name}: got {value} tokens, expected the end of a group: one of {starts}")
        if stop < length:
            raise ValueError(f"stop: got {stop}, expected at least the prefix's {length} tokens")

        first, last = starts.index(length), starts.index(stop)
        scales, filters = self.guidance_and_filters(
            range(first, last),
            cfg_scale=cfg_scale,
            cfg_interval=cfg_interval,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
        )
        plan = Plan(
            batch=batch,
            first=first,
            stop=last,
            sampler=sampler,
            scales=tuple(scales),
            filters=tuple(filters.items()),
            flow=(("steps", steps), ("solver", solver)),
            options=tuple(options.items()),
        )
        prefix = torch.empty(batch, 0, dtype=torch.int64, device=device) if prefix is None else prefix
        # Autocast is for training: decoding is in the dtype of the weights.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            chance = noise if uniform is None else uniform
            if sampler == "multinomial" and uniform is None:
                chance = torch.rand(batch, self.num_tokens, generator=generator, dtype=torch.float32, device=device)
            inputs = Inputs(condition=condition, prefix=prefix, chance=chance)
            codes = inputs.prefix if last == first else decode(self, plan, inputs, graph=graph)
            check_decoded(codes)
        return codes.clone()  # outside inference mode, so that the codes can enter a training graph
