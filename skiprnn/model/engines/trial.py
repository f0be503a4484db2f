"""An engine beside the reference engine on small networks: what contact asks for, in a process of its own."""

import time

import torch
from torch import Tensor

from skiprnn.model import engines
from skiprnn.model.engines.contact import Variant
from skiprnn.model.policies import Skip
from skiprnn.model.recurrent import Recurrent

SEEDS = 6  # a decision on the edge is rounded either way: so many inputs are tried
SHAPE, RAGGED = (16, 16, 1), (5, 9, 2)  # B, T, I: whole tiles, as are common; and odd sizes with lengths
UNITS = {1: 110, 2: 60}  # by layers
NOT_SERVED = "it does not serve: "  # begins what is no failure


def error(engine: str, device: str, tested: Variant, lengths: bool) -> float:
    """The largest relative error of outputs and gradients against the reference in float64; inf: other decisions."""
    batch, steps, inputs = RAGGED if lengths else SHAPE
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        rnn = network(tested, inputs)
        if isinstance(rnn.policy, Skip):
            torch.nn.init.constant_(rnn.policy.bias, -0.5)
        x = 1 + torch.randn(batch, steps, inputs)  # about 0, weight_ih's gradient would be what rounding leaves
        given = torch.randint(1, steps + 1, (batch,)) if lengths else None
        draw = rnn.policy.draw(x, sum(cell.hidden_size for cell in rnn.cells))
        found = [
            _outcome(rnn.to(place, dtype), x.to(place, dtype), given, draw, name)
            for name, place, dtype in (("reference", "cpu", torch.float64), (engine, device, torch.float32))
        ]
        if torch.equal(found[0][0], found[1][0].double()):
            pairs = zip(found[0][1:], found[1][1:], strict=True)
            return max(float((one - other).norm() / one.norm().clamp_min(1e-6)) for one, other in pairs)
    return float("inf")


def network(tested: Variant, inputs: int) -> Recurrent:
    """What is tried of a variant."""
    p_skip = 0.4 if tested.policy.startswith("random") else None
    return Recurrent(*tested[:2], inputs, UNITS[tested.layers], tested.layers, batch_first=True, p_skip=p_skip)


def _outcome(rnn, x: Tensor, lengths: Tensor | None, draw: Tensor | None, engine: str) -> list[Tensor]:
    """Updates, output and gradients, on the CPU."""
    rnn.zero_grad()
    draw = None if draw is None else draw.to(x)
    call = rnn.prepare(x, lengths=None if lengths is None else lengths.to(x.device), draw=draw)
    with torch.no_grad():
        (inferred,) = engines.run_packed(engine, [call])
    (result,) = engines.run_packed(engine, [call])
    loss = result.output.sum() + result.states[-1][0].square().sum() + 1e-2 * result.updates.sum()
    loss.backward()
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in rnn.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        groups.setdefault("policy" if name.startswith("policy") else name, []).append(gradient.flatten())
    gradients = [torch.cat(parts) for parts in groups.values()]
    return [tensor.detach().cpu().double() for tensor in (result.updates, result.output, inferred.output, *gradients)]


def check(engine: str, device: str, tested: Variant) -> float | str:
    """The variant's largest error, or why it fails or is not served."""
    try:
        rnn, many = network(tested, RAGGED[2]), torch.empty(1024, 1, RAGGED[2], device=device)  # that fill a GPU
        if reason := engines.ENGINES[engine].unsupported(rnn.cells, rnn.policy, many):
            return NOT_SERVED + reason
        return max(error(engine, device, tested, lengths) for lengths in (False, True))
    except Exception as failure:  # whatever compilers and drivers come up with
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"


def milliseconds(engine: str, device: str, tested: Variant, steps: int = 32) -> float:
    """Of one time step, forward and backward, with 256 sequences of one input and 110 units."""
    p_skip = 0.5 if tested.policy.startswith("random") else None
    rnn = Recurrent(*tested[:2], 1, 110, tested.layers, batch_first=True, engine=engine, p_skip=p_skip, device=device)
    x, times = torch.rand(256, steps, 1, device=device), []
    for _ in range(4):
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad(rnn(x)[0].sum(), [rnn.cells[0].weight_hh])
        gradient.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / steps
