"""The training state inside DeepSpeed's ZeRO optimizer, by parameter name and independent of the topology."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.checkpoint.reading import Checkpoint
from moe.checkpoint.saving import Fragment
from moe.distributed.agreement import rank_and_size
from moe.model.experts import GroupedExperts
from moe.model.initialization import initial_weights

_KINDS = ("weights", "exp_avg", "exp_avg_sq")


class ZeroState:
    """This rank's share of the fp32 weights and of Adam's moments.

    Args:
        model: under the engine.
        zero: DeepSpeed's ZeRO optimizer, stage 1 or 2.
    """

    def __init__(self, model: nn.Module, zero: Any):
        self._model, self._zero = model, zero
        self._layouts = dict(_layouts(model))
        parameters = dict(model.named_parameters())
        self._buffers = {name: part for name, part in model.state_dict().items() if name not in parameters}

    def fragments(self) -> Iterator[Fragment]:
        """What this rank has to save; over all ranks, each element of the state comes exactly once.

        fp32 `weights`, `exp_avg` and `exp_avg_sq`, under the parameters' names and, for experts, at the
        places of their ids among all experts; and buffers, which are equal on all ranks, as `weights`. Views:
        nothing is copied.
        """
        for name, parameter in self._model.named_parameters():
            layout = self._layouts[name]
            for flat, inside, place in self.parts_of(parameter):
                for kind in _KINDS:
                    values = self._of_kind(flat, kind)[place]
                    yield Fragment(kind, name, layout.shape, layout.start + inside.start, values)
        for name, buffer in self._buffers.items() if rank_and_size()[0] == 0 else ():
            yield Fragment("weights", name, tuple(buffer.shape), 0, buffer.flatten())

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of any topology; each rank reads only what it holds.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape; nothing was changed then.
        """
        shapes = {name: layout.shape for name, layout in self._layouts.items()}
        buffers = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        for kind in _KINDS:
            checkpoint.check_names(kind, shapes | buffers if kind == "weights" else shapes)
        updates = float(checkpoint.step - checkpoint.info.skipped_steps)
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(updates, device=flat.device),  # for Adam's bias correction
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, parameter in self._model.named_parameters():
            start = self._layouts[name].start
            for flat, inside, place in self.parts_of(parameter):
                for kind in _KINDS:
                    self._of_kind(flat, kind)[place].copy_(  # no name: it would live through the next read
                        checkpoint.read(kind, name, start + inside.start, inside.stop - inside.start)
                    )
            parameter.copy_(checkpoint.read("weights", name, start, parameter.numel()).view(parameter.shape))
        for name, buffer in self._buffers.items():
            buffer.copy_(checkpoint.read("weights", name).view(buffer.shape))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set the model's weights and this rank's fp32 master weights to the initial values of a seed.

        Buffers start at 0.
        """
        for buffer in self._buffers.values():
            buffer.zero_()
        for _, parameter, values in initial_weights(self._model, seed):
            parameter.copy_(values)
            for flat, inside, place in self.parts_of(parameter):
                self._of_kind(flat, "weights")[place].copy_(values.flatten()[inside])

    def train_in_place(self) -> None:
        """Let AdamW update the model's own weights, of which fp32 master weights are an equal copy."""
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            (master.data,) = self._zero.get_bit16_param_group(i)
        self._zero._link_all_hp_params()  # DeepSpeed's views of the copy would keep it alive

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters and this rank's part of their gradients, inside `Engine.step` before the update."""
        for group, parts in self._zero.averaged_gradients.items():
            parts = (part for part in parts if not getattr(part, "_zero_padding", False))
            # Not strict: a rank with none of the group's parameters has one tensor of padding, not marked so.
            yield from zip(self._zero.params_in_partition[group], parts, strict=False)

    def parts_of(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, slice, slice]]:
        """This rank's part of a parameter: the flat fp32 tensor it is in, and its places in both.

        ZeRO flattens the parameters of a group, splits the result over the ranks and records in `_hp_mapping`
        which slice of a parameter fell to this rank. DeepSpeed's own accessors do not work here: they
        link the moments before every group has been stepped.
        """
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield (
            self._zero.single_partition_of_fp32_groups[mapping.param_group_index],
            slice(inside.start, inside.start + inside.numel),
            slice(place.start, place.start + place.numel),
        )

    def _of_kind(self, flat: Tensor, kind: str) -> Tensor:
        return flat.detach() if kind == "weights" else self._zero.optimizer.state[flat][kind]


class _Layout(NamedTuple):
    """Where a rank's parameter lies in the model's: the whole shape, and the first element in it."""

    shape: tuple[int, ...]
    start: int


def _layouts(model: nn.Module) -> Iterator[tuple[str, _Layout]]:
    ids = {
        id(weight): (module.expert_ids, module.num_experts)
        for module in model.modules()
        if isinstance(module, GroupedExperts)
        for weight in module.parameters()
    }
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if id(parameter) in ids:
            here, num_experts = ids[id(parameter)]
            yield name, _Layout((num_experts, *shape[1:]), here.start * parameter[0].numel())
        else:
            yield name, _Layout(shape, 0)
