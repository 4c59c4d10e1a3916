"""AdamW behind bfloat16 weights: as exact as fp32, in the memory that the plan counts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tapfm.encoders.compiled import CompilerError, need_compiler
from tapfm.engine import master_weights as masters
from tapfm.engine import packed
from tapfm.engine.master_weights import SCHEMES, MasterAdamW
from tapfm.engine.packed import EAGER, chances, join_bits, pack, split_bits, unpack

N = 20_000
EXACT = ("master", "offload")  # to the bit; the residual scheme has moments of 8 bits


def start(seed=0):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * 0.02


def trajectory(make, lr, steps=200):
    """Return the weights after some updates on noisy gradients of widely different sizes."""
    weight = nn.Parameter(start())
    optimizer = make([{"params": [weight], "lr": lr, "weight_decay": 1e-4}])
    (learns,) = optimizer.param_groups[0]["params"]
    draw = torch.Generator().manual_seed(1)
    size = torch.randn(N, generator=draw).exp() * 1e-3
    for _ in range(steps):
        noise = 1 + 2 * torch.randn(N, generator=draw)
        learns.grad = (size * noise).to(learns.dtype)
        optimizer.step()
    if isinstance(optimizer, MasterAdamW):
        assert weight.dtype == torch.bfloat16
        (kept,) = optimizer.kept.values()
        exact = kept.read()[0]
        assert torch.equal(split_bits(exact)[0], weight) or torch.equal(exact.bfloat16(), weight)
        return exact
    return learns.detach().float()


def naive(groups):
    """Train bfloat16 weights without masters: they are rounded after every step."""
    for group in groups:
        for weight in group["params"]:
            weight.data = weight.data.bfloat16()
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("lr", [1e-6, 1e-8])
def test_weights_move_as_fp32_adamw_moves_them(lr):
    """200 updates at a fine-tuning rate, and at the end of its cosine."""
    reference = trajectory(lambda groups: torch.optim.AdamW(groups, fused=True), lr)
    way = (reference - start()).norm()
    assert way > 0

    def off(weights):
        return float((weights - reference).norm() / reference.norm())

    for scheme in SCHEMES:
        weights = trajectory(lambda groups, scheme=scheme: MasterAdamW(groups, scheme), lr)
        error = float((weights - reference).norm() / way)
        assert error <= (0 if scheme in EXACT else 0.1), scheme
        assert off(weights) < 1e-3, scheme
    stuck = trajectory(naive, lr)
    assert off(stuck) > 1e-3, "naive bfloat16 would do, and this file would be needless"
    assert float((stuck - start().bfloat16()).norm() / way) < 0.6


def test_split_and_join_lose_nothing():
    values = start() * torch.linspace(-60, 60, N).exp2()
    edges = torch.tensor([0, 0x8000, 0x18000, 0x3F808000, 0x3F818000, 0x3F807FFF, 1, 0x7F7F0000])
    edges = torch.cat([edges, edges + 2**31]).to(torch.int32).view(torch.float32)
    for exact in (values, edges):
        weight, low = split_bits(exact)
        assert torch.equal(join_bits(weight, low).view(torch.int32), exact.view(torch.int32))
        half_a_step = torch.nextafter(weight.abs(), weight.new_tensor(torch.inf)) - weight.abs()
        assert ((weight.double() - exact.double()).abs() <= half_a_step.double() / 2).all()


@pytest.mark.parametrize(("kind", "step"), [(torch.int8, 0.104), (torch.uint8, 0.0502)])
def test_packing_keeps_relative_error_sign_and_what_is_not_zero(kind, step):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(100, 77, generator=draw) * torch.rand(100, 77, generator=draw).square()
    values = values.abs() if kind == torch.uint8 else values
    values[0] = 0
    once = unpack(*pack(values, kind, chances(values, 3)), values.shape)
    assert torch.equal(once == 0, values == 0)
    assert torch.equal(once.sign(), values.sign())
    large = values.abs() > 2e-5 * values.abs().max()  # the scale reaches down to 2 ** -18
    assert ((once - values).abs() <= step * values.abs() * 1.001)[large].all()
    assert torch.equal(once, unpack(*pack(values, kind, chances(values, 3)), values.shape))
    drawn = (pack(values, kind, chances(values, n)) for n in range(400))
    mean = sum(unpack(*each, values.shape) for each in drawn) / 400
    assert ((mean - values).abs() <= 0.2 * step * values.abs())[large].float().mean() > 0.999


def test_gradients_of_chunks_are_summed_in_fp32():
    """300 chunks; bfloat16's own `.grad` loses what is smaller than half a step of the sum."""
    draw = torch.Generator().manual_seed(0)
    chunks = [(torch.randn(N, generator=draw) + 1).bfloat16() for _ in range(300)]
    exact = sum(chunk.double() for chunk in chunks)

    def summed(parameter, learns):
        for chunk in chunks:
            (parameter * chunk).sum().backward()
        return float((learns.grad.double() - exact).norm() / exact.norm())

    weight = nn.Parameter(start())
    optimizer = MasterAdamW([{"params": [weight], "lr": 1e-6, "weight_decay": 0.0}], "master")
    assert summed(weight, optimizer.param_groups[0]["params"][0]) < 1e-6
    assert weight.grad is None, "the chunk's own gradient is let go"
    plain = nn.Parameter(start().bfloat16())
    assert summed(plain, plain) > 1e-2


def test_a_gradient_that_memory_had_no_room_for_counts_as_not_received():
    class TooLarge:
        def to(self, dtype):
            raise torch.OutOfMemoryError

    weight = nn.Parameter(start())
    stand_in = masters._stand_in(weight)
    chunk = SimpleNamespace(grad=TooLarge())
    with pytest.raises(torch.OutOfMemoryError):
        masters._summing_into(stand_in)(chunk)
    assert chunk.grad is None
    assert stand_in.grad is None


@pytest.mark.parametrize(("scheme", "bytes_each"), [("master", 14), ("residual", 6.03125)])
def test_memory_is_what_the_plan_counts(scheme, bytes_each):
    """Weight, what is kept of it, and no more; 4 for the gradient come on top."""
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = MasterAdamW([{"params": [weight], "lr": 1e-6}], scheme)
    (kept,) = optimizer.kept.values()
    tensors = [t for t in kept.state().values() if isinstance(t, torch.Tensor)]
    held = sum(t.untyped_storage().nbytes() for t in [weight, *tensors])
    assert held == bytes_each * weight.numel()
    (stand_in,) = optimizer.param_groups[0]["params"]
    assert stand_in.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resumed_equals_never_stopped(scheme):
    draw = torch.Generator().manual_seed(2)
    grads = torch.randn(6, N, generator=draw)

    def run(optimizer, steps):
        (learns,) = optimizer.param_groups[0]["params"]
        for grad in steps:
            learns.grad = grad.clone()
            optimizer.step()

    def make(weight):
        return MasterAdamW([{"params": [weight], "lr": 1e-4, "weight_decay": 1e-2}], scheme)

    whole = nn.Parameter(start())
    run(make(whole), grads)

    stopped = nn.Parameter(start())
    before = make(stopped)
    run(before, grads[:3])
    resumed = nn.Parameter(stopped.detach().float())  # as a checkpoint gives the weights back
    after = make(resumed)
    after.load_state_dict(before.state_dict())
    run(after, grads[3:])
    assert torch.equal(whole, resumed)


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="'half' is none of adamw, master, residual, offload"):
        MasterAdamW([{"params": [nn.Parameter(start())]}], "half")


def test_weights_of_equal_shape_round_by_other_random_numbers():
    torch.manual_seed(0)
    grad = torch.randn(64, 64)
    weights = [nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = MasterAdamW([{"params": weights, "lr": 1e-3}], "residual")
    for weight in weights:
        (weight.float() * grad).sum().backward()
    optimizer.step()
    one, other = optimizer.kept.values()
    assert torch.equal(one.first_scale, other.first_scale)
    assert not torch.equal(one.first, other.first)


def residual_run(shapes=((300, 77), (1024,), (5,))):
    """Return the optimizer after four updates of several weights at sizes of all kinds."""
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=draw) * 0.02) for shape in shapes]
    groups = [{"params": weights, "lr": 1e-5, "weight_decay": 1e-4}]
    optimizer = MasterAdamW(groups, "residual")
    for _ in range(4):
        for weight in optimizer.param_groups[0]["params"]:
            size = torch.randn(weight.shape, generator=draw).exp() * 1e-3
            weight.grad = size * torch.randn(weight.shape, generator=draw)
        optimizer.step()
    return optimizer


def test_a_compiled_update_is_the_same_to_the_bit(monkeypatch):
    try:
        need_compiler(torch.device("cpu"))
    except CompilerError as error:  # a compiler is optional, and the error says what to install
        pytest.skip(f"nothing can be compiled here: {error}")
    eager = residual_run()
    monkeypatch.setattr(packed, "COMPILED_FROM", 1)
    compiled = residual_run()
    pairs = list(zip(eager.kept.values(), compiled.kept.values(), strict=True))
    assert all(one.coder is EAGER and other.coder is not EAGER for one, other in pairs)
    for one, other in pairs:
        assert torch.equal(one.weight, other.weight)
        assert one.state().keys() == other.state().keys() == {"updates", *one.names}
        for name in one.names:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.first.count_nonzero() > 0


def test_without_a_compiler_an_update_is_said_to_take_longer(monkeypatch, capsys):
    monkeypatch.setattr(packed, "COMPILED_FROM", 1)
    monkeypatch.setattr(torch, "compile", broken)
    kept = residual_run().kept.values()
    assert all(each.coder is EAGER for each in kept)
    assert capsys.readouterr().out.splitlines() == [
        "model.optimizer residual: updates are not compiled, which takes longer: no compiler"
    ]


def broken(*_, **__):
    raise RuntimeError("no compiler\nand a long explanation")
