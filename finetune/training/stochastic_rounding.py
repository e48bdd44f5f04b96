"""StochasticRounding: training in bf16 alone, with 4 bytes per weight and gradient instead of 8 (12 at an update).

An update is often smaller than bf16 can add to a weight. Rounded to nearest it would be lost each time; rounded at
random to one of the two neighbours, the nearer the likelier, it arrives on average (Gupta et al. 2015, "Deep Learning
with Limited Numerical Precision", eq. 2).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.seeding import fold

PIECE = 2**25
"""Weights, at most, that are in fp32 at once, unless a single parameter has more."""


class StochasticRounding:
    """The parameters of a network that learn, in bf16, and the fp32 ones through which an optimizer updates them.

    It does for `Trainer` what `MasterWeights` does. A parameter that an earlier optimizer holds is empty but for its
    turn in an update; then it is an fp32 copy of the one in the network, with its gradient; that of a convolution is a
    matrix, (out, in x height x width), of which Adafactor keeps a row and a column, where of four dimensions it would
    keep two thirds. The optimizer keeps what it keeps in fp32. It must treat each parameter for itself.

    Args:
        network: in fp32, or rounded to bf16 already.
    """

    def __init__(self, network: nn.Module):
        self.held = {name: p for name, p in network.named_parameters() if p.requires_grad}
        """What an optimizer holds."""
        self.parameters: Mapping[str, nn.Parameter] = {}
        for name, parameter in self.held.items():
            owner, _, leaf = name.rpartition(".")
            self.parameters[name] = nn.Parameter(parameter.detach().bfloat16())
            setattr(network.get_submodule(owner), leaf, self.parameters[name])
            parameter.data = parameter.data.new_empty(0, dtype=torch.float32)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16)
        self.working = self.parameters
        self.pieces = _pieces({name: p.numel() for name, p in self.parameters.items()})
        """Names of the parameters that are updated together."""

    def collect(self) -> None:
        """Gradients of micro-batches are added up where they are, in bf16."""

    def discard(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, step: Callable[[], object], key: int) -> None:
        """`step` of the optimizer, for a piece of the weights at a time.

        Args:
            step: updates those of the parameters it holds that have a gradient.
            key: of what is drawn for the rounding.
        """
        for number in range(len(self.pieces)):
            self.update_piece(number, step, key)

    @torch.no_grad()
    def update_piece(self, number: int, step: Callable[[], object], key: int) -> None:
        """Update one of `pieces`, in any order; its random numbers follow from `key` and `number`."""
        learned = [(self.parameters[name], self.held[name]) for name in self.pieces[number]]
        learned = [(parameter, held) for parameter, held in learned if parameter.grad is not None]
        if not learned:
            return
        generator = torch.Generator(learned[0][0].device).manual_seed(fold(key, number))
        rounded = [parameter.data for parameter, _ in learned]
        masters, gradients = (
            [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in rounded] for _ in range(2)
        )
        torch._foreach_copy_(masters, rounded)
        torch._foreach_copy_(gradients, [parameter.grad for parameter, _ in learned if parameter.grad is not None])
        for (parameter, held), weight, gradient in zip(learned, masters, gradients, strict=True):
            parameter.grad = None
            held.data, held.grad = _as_matrix(weight), _as_matrix(gradient)
        step()
        for weight in masters:
            round_at_random_(weight, generator)
        torch._foreach_copy_(rounded, masters)
        for _, held in learned:
            held.grad = None
            held.data = held.data.new_empty(0)

    def write_back(self) -> None:
        """What was updated is where it belongs."""

    @contextmanager
    def lent_weights(self) -> Iterator[None]:
        """Do nothing: the network always holds what it has learned."""
        yield


def round_at_random_(x: Tensor, generator: torch.Generator) -> None:
    """Round fp32 numbers, in place, to numbers that bf16 has: unbiased, up with the probability of the distance from
    the neighbour below. They are finite.

    The lower 16 bits of an fp32 number are those that bf16 has not; a random number of 16 bits, added to them, carries
    into the upper ones as often as they are large.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits &= -(2**16)


def _as_matrix(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 2 else x


def _pieces(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names, in order, in groups of at most `PIECE` numbers."""
    pieces, room = [[]], PIECE
    for name, size in sizes.items():
        if size > room and pieces[-1]:
            pieces.append([])
            room = PIECE
        pieces[-1].append(name)
        room -= size
    return pieces
