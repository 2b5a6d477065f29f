r"""
Reading sharded parameters: the proxy's coordinates of a weight, of its drift since the start, or of the last step's
gradient, from what each rank holds (paper Eq. 4).

The coordinates of a matrix G (out x in) along the proxy's directions are diag(U^T G V), which is linear in G. What a
rank holds of G under DeepSpeed ZeRO is a contiguous piece of its flattened form, so each rank projects the rows of its
piece, the edges padded with zeros, and one all-reduce of R floats finishes: no full weight or gradient is gathered.

A LoRA layer acts by W + s B A. A gradient step on its factors moves that by s (dB A + B dA), whose coordinates need
U^T B, U^T dB, A V and dA V only, thin matrices of rank columns that are linear in what ranks hold as well.

Legend: r rank of one proxy, R sum of the ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


Basis = tuple[torch.Tensor, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


class Piece(NamedTuple):
    """
    A contiguous part of a matrix in row-major order, of which every element is held by exactly one rank.

    Attributes:
        values (`torch.Tensor` of shape `(n,)`): the elements.
        start (`int`): index of the first in the flattened matrix.
        shape (`tuple[int, int]`): shape of the whole matrix.
    """

    values: torch.Tensor
    start: int
    shape: tuple[int, int]

    def rows(self) -> tuple[slice, torch.Tensor]:
        """The rows that the piece touches, and their elements in fp32, 0 where others hold them."""
        width = self.shape[1]
        stop = self.start + len(self.values)
        first, last = self.start // width, -(-stop // width)
        values = self.values.float()
        if self.start != first * width or stop != last * width:
            values = nn.functional.pad(values, (self.start - first * width, last * width - stop))
        return slice(first, last), values.view(last - first, width)

    def coordinates(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """This piece's share of diag(U^T G V), `(r,)`."""
        where, rows = self.rows()
        return (u[where] * (rows @ v)).sum(0)

    def left(self, u: torch.Tensor) -> torch.Tensor:
        """This piece's share of U^T G, `(r, in)`."""
        where, rows = self.rows()
        return u[where].T @ rows

    def right(self, v: torch.Tensor) -> torch.Tensor:
        """This piece's share of G V, `(out, r)`."""
        where, rows = self.rows()
        product = torch.zeros(self.shape[0], v.shape[1], device=v.device)
        product[where] = rows @ v
        return product


def weight_piece(parameter: nn.Parameter, rank: int = 0, world_size: int = 1) -> Piece:
    """
    This rank's piece of a weight matrix, in fp32 where the optimiser keeps such a copy.

    Args:
        parameter (`nn.Parameter`): plain, or managed by DeepSpeed ZeRO 1, 2 or 3.
        rank (`int`, *optional*, defaults to 0): of this process.
        world_size (`int`, *optional*, defaults to 1): number of processes, among which plain weights are divided.

    Raises:
        ValueError: if the weight is sharded in a way that cannot be read piecewise.
    """
    if hasattr(parameter, "ds_id"):
        values = parameter._z3_optimizer.get_local_fp32_param(parameter) if _is_trained(parameter) else None
        return _zero3_piece(parameter, parameter.ds_tensor if values is None else values)
    if hasattr(parameter, "_hp_mapping"):
        return _zero12_piece(parameter, lambda mapping: mapping.hp_fragment)
    return _plain_piece(parameter.detach(), rank, world_size)


def gradient_piece(parameter: nn.Parameter, rank: int = 0, world_size: int = 1) -> Piece:
    """
    This rank's piece of a weight's gradient, averaged over ranks and not yet clipped, between backward and step.

    Raises:
        ValueError: if there is none, or it is sharded in a way that cannot be read piecewise.
    """
    if hasattr(parameter, "ds_id"):
        return _zero3_piece(parameter, parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter))
    if hasattr(parameter, "_hp_mapping"):
        return _zero12_piece(parameter, lambda mapping: mapping.get_lp_grad_fragment(parameter._index_in_param_group))
    if parameter.grad is None:
        raise ValueError("A proxy weight has no gradient. Let it be trained, or set parameter_update='adaptation'.")
    return _plain_piece(parameter.grad.detach(), rank, world_size)


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and hasattr(parameter, "_z3_optimizer")


def _zero3_piece(parameter: nn.Parameter, values: torch.Tensor) -> Piece:
    """A ZeRO-3 partition: equal parts of the flattened parameter, of which the last is padded."""
    from deepspeed import comm

    size = parameter.ds_tensor.ds_numel
    if comm.get_world_size(parameter.ds_process_group) != comm.get_world_size():
        raise ValueError("MiCS and hpZ shard weights more than once, which cannot be read. Set them off.")
    start = comm.get_rank(parameter.ds_process_group) * size
    values = values.detach().flatten()[: max(0, parameter.ds_numel - start)]
    return Piece(values, min(start, parameter.ds_numel), tuple(parameter.ds_shape))


def _zero12_piece(parameter: nn.Parameter, read: Callable) -> Piece:
    """A ZeRO-1 or -2 fragment: the part of the parameter that lies in this rank's part of the flat fp32 buffer."""
    mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
    if mapping is None:
        return Piece(parameter.detach().flatten()[:0], 0, shape)
    address, values = mapping.lp_fragment_address, read(mapping).detach().flatten()
    if len(values) == parameter.numel():  # some optimisers keep an accumulation buffer of the whole parameter
        values = values[address.start : address.start + address.numel]
    return Piece(values[: address.numel], address.start, shape)


def _plain_piece(values: torch.Tensor, rank: int, world_size: int) -> Piece:
    """A part of what every rank holds whole: an equal share of the rows."""
    num_rows, width = values.shape
    first, last = num_rows * rank // world_size, num_rows * (rank + 1) // world_size
    return Piece(values[first:last].flatten(), first * width, (num_rows, width))


class ShardedProxy:
    """
    The proxy's weights, read piecewise.

    Args:
        modules (`dict[str, nn.Module]`): linear layers, plain or with LoRA around them, by name.
        reduce (`Callable`, *optional*): sums a tensor over all ranks.
        rank (`int`, *optional*, defaults to 0): of this process.
        world_size (`int`, *optional*, defaults to 1): number of processes.
    """

    def __init__(
        self, modules: dict[str, nn.Module], reduce: Reduce = lambda values: values, rank: int = 0, world_size: int = 1
    ):
        self.modules, self.reduce, self.rank, self.world_size = modules, reduce, rank, world_size
        self.start: dict[str, Piece] | None = None

    def remember_start(self) -> None:
        """Keep this rank's pieces of the present weights, from which drift counts."""
        self.start = {}
        for name, parameter in self._parameters():
            piece = self._weight(parameter)
            self.start[name] = piece._replace(values=piece.values.clone())

    def start_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's start weights for a checkpoint; nothing if none are remembered."""
        tensors = {}
        for name, piece in (self.start or {}).items():
            tensors |= {f"{name}:values": piece.values, f"{name}:start": torch.tensor(piece.start)}
        return tensors

    def load_start(self, ranks: list[dict[str, torch.Tensor]]) -> None:
        """
        Remember the start weights that all ranks of an earlier run have kept, however many they were.

        Raises:
            ValueError: if they do not cover this rank's share of the weights.
        """
        self.start = {}
        for name, parameter in self._parameters():
            piece = self._weight(parameter)
            values = torch.full((len(piece.values),), torch.nan)
            for tensors in ranks:
                if f"{name}:values" not in tensors:
                    continue
                saved, offset = tensors[f"{name}:values"].float(), int(tensors[f"{name}:start"]) - piece.start
                first, last = max(0, offset), min(len(values), offset + len(saved))
                if first < last:
                    values[first:last] = saved[first - offset : last - offset]
            if values.isnan().any():
                raise ValueError(f"The checkpoint lacks start weights of {name}. Was one of its files removed?")
            self.start[name] = piece._replace(values=values.to(piece.values.device))

    def drift(self, bases: dict[str, Basis]) -> torch.Tensor:
        """
        Coordinates of theta - theta_0, `(R,)`, the same on every rank.

        Raises:
            ValueError: if no start is remembered.
        """
        if self.start is None:
            raise ValueError("No start weights are remembered: call remember_start() before training.")

        def moved(name, parameter):
            piece = self._weight(parameter)
            return piece._replace(values=piece.values.float() - self.start[name].values.float())

        # s (B A - B_0 A_0) = s (dB A + B_0 dA)
        return self._change(bases, moved, before=lambda name, _: self.start[name])

    def gradient(self, bases: dict[str, Basis]) -> torch.Tensor:
        """Coordinates of the gradient that backward has left and no step has used yet, `(R,)`, the same on every rank."""

        def slope(name, parameter):
            return gradient_piece(parameter, self.rank, self.world_size)

        return self._change(bases, slope, before=lambda _, parameter: self._weight(parameter))

    def _change(self, bases: dict[str, Basis], change: Callable, before: Callable) -> torch.Tensor:
        """Coordinates of a change of the effective weights, by one all-reduce."""
        plans, shares = [], []
        for name, (u, v) in bases.items():
            factors = list(_lora_factors(name, self.modules[name]))
            if not factors:
                weight = self.modules[name].weight
                shares.append([change(f"{name}.weight", weight).coordinates(u, v)])
            for a_name, a, b_name, b, _ in factors:
                now_a = self._weight(a)
                shares.append(
                    [
                        change(b_name, b).left(u),  # U^T dB  (r, k)
                        now_a.right(v),  # A V  (k, r)
                        before(b_name, b).left(u),  # U^T B_0
                        change(a_name, a).right(v),  # dA V
                    ]
                )
            plans.append((u.shape[1], [scaling for *_, scaling in factors]))
        flat = self.reduce(torch.cat([part.flatten() for row in shares for part in row]))
        sizes = iter(flat.split([part.numel() for row in shares for part in row]))
        rows = iter([[next(sizes).view_as(part) for part in row] for row in shares])
        coordinates = []
        for rank, scalings in plans:
            if not scalings:
                coordinates.append(next(rows)[0])
                continue
            total = flat.new_zeros(rank)
            for scaling in scalings:
                left, a, b, right = next(rows)
                total += scaling * ((left * a.T).sum(1) + (b * right.T).sum(1))
            coordinates.append(total)
        return torch.cat(coordinates)

    def _weight(self, parameter: nn.Parameter) -> Piece:
        return weight_piece(parameter, self.rank, self.world_size)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.modules.items():
            factors = list(_lora_factors(name, module))
            if not factors:
                yield f"{name}.weight", module.weight
            for a_name, a, b_name, b, _ in factors:
                yield from ((a_name, a), (b_name, b))


def _lora_factors(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, str, nn.Parameter, float]]:
    """Names and weights of A and B and the scaling of each active adapter of a LoRA layer; nothing for other layers."""
    if not hasattr(module, "lora_A"):
        return
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield f"{name}.lora_A.{adapter}", a, f"{name}.lora_B.{adapter}", b, module.scaling[adapter]


@contextmanager
def gathered(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    Hold the full weights of some modules of a model for the duration, by one gather; does nothing but for ZeRO-3.

    All ranks must enter. DeepSpeed's own hooks on whatever owns these weights (an embedding may share them) rest
    meanwhile: they would gather the weights again, and release them after every call.
    """
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    sharded = {key: parameter for key, parameter in parameters.items() if hasattr(parameter, "ds_id")}
    if not sharded:
        yield
        return
    from deepspeed import zero

    owners = [part for part in model.modules() if any(id(own) in sharded for own in part.parameters(recurse=False))]
    # What DeepSpeed has begun to fetch ahead, it would release again in the midst of the pass.
    optimizers = {parameter._z3_optimizer for parameter in sharded.values() if hasattr(parameter, "_z3_optimizer")}
    for optimizer in optimizers:
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    kept = [(part, name, getattr(part, name)) for part in owners for name in names]
    with zero.GatheredParameters(list(sharded.values())):
        for part, name, hooks in kept:
            setattr(part, name, type(hooks)())
        try:
            yield
        finally:
            for part, name, hooks in kept:
                setattr(part, name, hooks)


def before_every_step(engine, observe: Callable[[], None]) -> None:
    """Call `observe` whenever a DeepSpeed engine is about to step: accelerate runs backward and step in one call."""
    step = engine.step

    def observed_step(*args, **kwargs):
        observe()
        return step(*args, **kwargs)

    engine.step = observed_step
