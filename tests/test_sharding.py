"""Reading sharded parameters piecewise, and whole runs under every arrangement of processes and ZeRO stages."""

import copy

import pytest
import torch
from torch import nn

from l2t_trl.sharding import Piece, ShardedProxy, gathered, gradient_piece, weight_piece


def pieces_of(matrix: torch.Tensor, borders: list[int]) -> list[Piece]:
    flat = matrix.flatten()
    edges = [0, *borders, len(flat)]
    return [Piece(flat[start:stop], start, tuple(matrix.shape)) for start, stop in zip(edges, edges[1:], strict=False)]


def test_coordinates_by_hand():
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    u = torch.tensor([[1.0], [0.0], [2.0]])
    v = torch.tensor([[1.0], [-1.0]])
    # u^T G v = 1 (1 - 2) + 2 (5 - 6) = -3; the second piece holds 2, 3, 4 and gives 1 * -2.
    first, second, third = pieces_of(matrix, [1, 4])
    assert [piece.coordinates(u, v).tolist() for piece in (first, second, third)] == [[1.0], [-2.0], [-2.0]]


@pytest.mark.parametrize("borders", [[], [1], [7, 8, 20], [5, 10, 15], [0, 0, 35], [34]])
def test_shares_of_pieces_add_up(borders):
    torch.manual_seed(0)
    matrix, u, v = torch.randn(7, 5), torch.randn(7, 3), torch.randn(5, 3)
    pieces = pieces_of(matrix, borders)
    for share, whole in (
        (lambda piece: piece.coordinates(u, v), (u.T @ matrix @ v).diagonal()),
        (lambda piece: piece.left(u), u.T @ matrix),
        (lambda piece: piece.right(v), matrix @ v),
    ):
        torch.testing.assert_close(sum(share(piece) for piece in pieces), whole)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_plain_weights_and_gradients_are_divided_among_ranks(world_size):
    torch.manual_seed(0)
    layer = nn.Linear(5, 7)
    layer(torch.randn(4, 5)).square().sum().backward()
    for read, whole in ((weight_piece, layer.weight.detach()), (gradient_piece, layer.weight.grad)):
        pieces = [read(layer.weight, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([piece.values for piece in pieces]).view(7, 5), whole)
        assert [piece.start for piece in pieces] == [7 * rank // world_size * 5 for rank in range(world_size)]


def test_a_weight_without_gradient_is_an_error():
    with pytest.raises(ValueError, match="no gradient"):
        gradient_piece(nn.Linear(2, 2).weight)


def test_drift_needs_a_start():
    with pytest.raises(ValueError, match="remember_start"):
        ShardedProxy({"a": nn.Linear(2, 2)}).drift({"a": (torch.ones(2, 1), torch.ones(2, 1))})


def orthonormal(size, rank):
    return torch.linalg.qr(torch.randn(size, rank))[0]


@pytest.mark.parametrize("wraps", [False, True])
def test_drift_and_gradient_equal_those_of_full_matrices(wraps):
    """All ranks of a made-up world are asked in turn; literal matrices say what their shares must add up to."""
    from peft import LoraConfig, get_peft_model

    from l2t_trl.proxy import effective_weight

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    bases = {"0": (orthonormal(9, 3), orthonormal(6, 3)), "2": (orthonormal(4, 2), orthonormal(9, 2))}
    if wraps:
        # LoRA on the first layer only, so that plain and wrapped layers stand side by side.
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, config).base_model.model
        model[2].requires_grad_(True)
    modules = {name: model.get_submodule(name) for name in bases}
    world = 3
    ranks = [ShardedProxy(modules, lambda share: share, rank, world) for rank in range(world)]

    start = {name: effective_weight(module).clone() for name, module in modules.items()}
    for one in ranks:
        one.remember_start()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()

    def literal(change):
        return torch.cat([(u.T @ change[name] @ v).diagonal() for name, (u, v) in bases.items()])

    # Products of thin factors do not add up over ranks, so the reduction runs before them, as in the real thing.
    def on_all_ranks(read):
        shares = []
        for one in ranks:
            one.reduce = lambda share: (shares.append(share), share)[1]
            read(one)
        ranks[0].reduce = lambda share: sum(shares)
        return read(ranks[0])

    drift = {name: effective_weight(module) - start[name] for name, module in modules.items()}
    torch.testing.assert_close(on_all_ranks(lambda one: one.drift(bases)), literal(drift))

    slopes = {"2": model[2].weight.grad}
    if wraps:
        a, b = model[0].lora_A["default"].weight, model[0].lora_B["default"].weight
        slopes["0"] = 3.0 * (b.grad @ a + b @ a.grad).detach()
    else:
        slopes["0"] = model[0].weight.grad
    torch.testing.assert_close(on_all_ranks(lambda one: one.gradient(bases)), literal(slopes))


def test_start_weights_fit_any_number_of_ranks():
    torch.manual_seed(0)
    modules = {"a": nn.Linear(5, 7), "b": nn.Linear(3, 4)}
    saved = []
    for rank in range(3):
        proxy = ShardedProxy(modules, lambda share: share, rank, 3)
        proxy.remember_start()
        saved.append(proxy.start_tensors())
    expected = {name: module.weight.detach().clone() for name, module in modules.items()}
    for module in modules.values():
        nn.init.zeros_(module.weight)
    for name, weight in expected.items():
        pieces = []
        for rank in range(2):
            proxy = ShardedProxy(modules, lambda share: share, rank, 2)
            proxy.load_start(saved)
            pieces.append(proxy.start[f"{name}.weight"].values)
        assert torch.equal(torch.cat(pieces).view_as(weight), weight)
    with pytest.raises(ValueError, match="lacks start weights"):
        ShardedProxy(modules).load_start(saved[:2])


def test_small_drift_of_large_weights_is_not_lost():
    """1e-6 of a weight of size 1e3: a difference of two projections in fp32 would be noise."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1e3 / layer.weight.norm())
    u, v = orthonormal(64, 4), orthonormal(64, 4)
    proxy = ShardedProxy({"a": layer})
    proxy.remember_start()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1e-4 * torch.randn(64, 64))
    expected = (u.double().T @ (layer.weight.detach().double() - before.double()) @ v.double()).diagonal()
    torch.testing.assert_close(proxy.drift({"a": (u, v)}).double(), expected, rtol=1e-4, atol=1e-9)


def test_gathered_does_nothing_to_plain_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(model[0].weight)
    with gathered(model, [model[0]]):
        model(torch.ones(1, 2))
    assert calls == [1]
    assert torch.equal(model[0].weight, twin)
