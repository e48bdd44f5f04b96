import torch
from torch import nn

from finetune.training.ema import Ema
from finetune.training.master_weights import MasterWeights


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for number, parameter in enumerate(net.parameters()):
        parameter.data = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / (number + 3)
    net[0].requires_grad_(False)
    return net


def test_the_network_computes_in_half_precision_and_what_learns_stays_in_full() -> None:
    net = network()
    before = {name: p for name, p in net.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in before.items()}
    masters = MasterWeights(net, torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["1.weight", "1.bias"]
    for name, parameter in before.items():
        assert masters.parameters[name] is parameter  # an optimizer made before has them
        assert torch.equal(parameter, values[name])
        assert torch.equal(net.get_parameter(name), values[name].bfloat16())
    assert net(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    """In bf16, 256 + 1 is 256."""
    masters = MasterWeights(network(), torch.bfloat16)
    for value in (256.0, 1.0, 1.0):
        for working in masters.working.values():
            working.grad = torch.full_like(working, value)
        masters.collect()
        assert all(working.grad is None for working in masters.working.values())
    assert all(torch.equal(p.grad, torch.full_like(p, 258.0)) for p in masters.parameters.values())


def test_an_update_too_small_for_half_precision_is_not_lost() -> None:
    net = network()
    masters = MasterWeights(net, torch.bfloat16)
    with torch.no_grad():
        net.get_parameter("1.bias").fill_(1.0)
        masters.parameters["1.bias"].fill_(1.0)
        for _ in range(100):
            masters.parameters["1.bias"] += 1e-4  # 1 + 1e-4 is 1 in bf16
            masters.write_back()
    assert torch.equal(net.get_parameter("1.bias"), torch.full((2,), 1.0078125).bfloat16())


def test_masters_are_lent_for_an_export_and_the_copies_come_back() -> None:
    net = network()
    masters = MasterWeights(net, torch.bfloat16)
    copies = dict(net.named_parameters())
    with masters.lent_weights():
        assert net.get_parameter("1.weight") is masters.parameters["1.weight"]
    assert all(net.get_parameter(name) is copy for name, copy in copies.items())


def test_without_a_dtype_nothing_is_copied() -> None:
    net = network()
    before = dict(net.named_parameters())
    masters = MasterWeights(net, None)
    assert all(net.get_parameter(name) is parameter for name, parameter in before.items())
    masters.parameters["1.bias"].grad = torch.ones(2)
    masters.collect()
    masters.write_back()
    assert torch.equal(masters.parameters["1.bias"].grad, torch.ones(2))


def test_an_average_is_of_the_masters() -> None:
    net = network()
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ema = Ema(learned)
    masters = MasterWeights(net, torch.bfloat16)
    assert all(ema.shadow[name].dtype == torch.float32 for name in masters.parameters)
    assert ema.parameters["1.bias"] is masters.parameters["1.bias"]
