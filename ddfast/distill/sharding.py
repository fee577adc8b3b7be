"""How a stage's networks lie on the processes: all of them on each, or a part (PyTorch's FSDP2, HSDP across nodes).

Both are one mesh of two dimensions, ("replicate", "shard"): gradients are reduced to the shards' owners within a node
and summed across the replicas once per step.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ddfast import processes
from ddfast.models.blocks import blocks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Spread(nn.Module):
    """The networks of a stage on the processes, as one root: in a call, weights outside of their blocks are whole.

    Outside of calls, parameters, gradients, optimizers' states and averages are DTensors, of which a process holds its
    part. In one process nothing is wrapped.

    Args:
        trained: the networks that a stage trains.
        teacher: frozen.
        strategy: replicate or shard.
        teacher_too: spread the teacher's blocks as well; until `restore`, copies stand in their place.
    """

    def __init__(
        self, trained: Iterable[nn.Module], teacher: nn.Module, *, strategy: str, teacher_too: bool = False
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleList(trained)
        self.spreads_teacher = teacher_too and processes.count() > 1
        self.whole_blocks: list[tuple[nn.Module, str, nn.Module]] = []
        if processes.count() == 1:
            return
        from torch.distributed.fsdp import (  # its import takes a second
            FSDPModule,
            fully_shard,
            register_fsdp_forward_method,
        )

        # Nothing here writes into a block's output.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        shards = processes.per_node() if strategy == "shard" else 1
        mesh = _mesh(next(self.parameters()).device.type, shards, processes.meeting())
        for network in self.trained:
            for block in blocks_of(network):
                fully_shard(block, mesh=mesh)
        ignored: set[nn.Parameter] = set()
        if self.spreads_teacher:
            self.teacher = teacher
            for block in self._copied_blocks(teacher):
                sharded = fully_shard(block, mesh=mesh)
                if hasattr(block, "constants"):  # of VAR, which decoding asks for beside the pass
                    register_fsdp_forward_method(block, "constants")
                # What is gathered first in inference mode, as decoding does, no pass outside of it could gather again.
                sharded.unshard()
                sharded.reshard()
            ignored = {parameter for parameter in teacher.parameters() if not processes.is_spread(parameter)}
        # Resharded after a call too: what is outside of calls is sharded, always.
        fully_shard(self, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        for module in self.modules():
            if isinstance(module, FSDPModule):  # parts contribute to sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments), with all weights there that it reads."""
        return function(*arguments)

    def accumulate(self, *, last: bool) -> None:
        """Say whether the next backward pass is the step's last: gradients are summed across replicas by that alone."""
        if processes.count() > 1:
            self.set_requires_all_reduce(last)  # type: ignore[operator]

    def restore(self) -> None:
        """Give the teacher its own blocks back."""
        for place, name, block in self.whole_blocks:
            setattr(place, name, block.to(next(self.trained.parameters()).device))

    def _copied_blocks(self, teacher: nn.Module) -> list[nn.Module]:
        """Copies of the teacher's blocks, in their place; the blocks themselves wait on the CPU."""
        blocks = set(blocks_of(teacher))
        found = [(name, module) for name, module in teacher.named_modules() if module in blocks]
        copies = []
        for name, block in found:
            place, _, own = name.rpartition(".")
            parent = teacher.get_submodule(place)
            copies.append(copy.deepcopy(block))
            setattr(parent, own, copies[-1])
            self.whole_blocks.append((parent, own, block.cpu()))
        return copies


@functools.cache
def _mesh(device: str, shards: int, meeting: int) -> DeviceMesh:
    """Of a meeting of processes, kept for its stages: a group of processes takes time and memory of a GPU."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (processes.count() // shards, shards), mesh_dim_names=("replicate", "shard"))
    processes.limit_waits(mesh.get_all_groups())
    return mesh
