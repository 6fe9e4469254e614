"""AdamW in less memory: torchao's numbers, rounding without bias by seed and place, states as large as planned."""

import math
from pathlib import Path

import pytest
import torch

from llava_next import versions
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.checkpoints.same_run import check_same_optimizer
from llava_next.training.forecast.budget import units
from llava_next.training.recipe.checks import check_run
from llava_next.training.recipe.config import OptimConfig, RunConfig, Source, parse_run
from llava_next.training.recipe.low_memory import LowMemoryAdamW, block_length, random_bits, round_stochastically
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from support.tiny import tiny_config
from support.tracing import find_torchao

SHAPES = ((64, 256), (300,), (100, 512), (8, 8), (96, 64), (24, 3, 14, 14))


@pytest.fixture
def torchao():
    find_torchao()
    return pytest.importorskip("torchao", reason="torchao is neither installed nor where LLAVA_NEXT_TORCHAO says")


def parameters_of(dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def adamw(parameters, eight_bit=True, seed=0, rate=1e-3, decay=0.1) -> LowMemoryAdamW:
    groups = [{"params": parameters, "name": "llm", "lr": rate, "weight_decay": decay}]
    return LowMemoryAdamW(groups, (0.9, 0.95), 1e-8, eight_bit, seed)


def set_gradients(step: int, *sets) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameters in zip(*sets, strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad_dtype = None
            parameter.grad = gradient.clone()


def test_8_bit_updates_are_bit_equal_to_torchao_s_own(torchao):
    from torchao.optim import AdamW8bit

    ours, theirs = parameters_of(), parameters_of()
    lengths = [block_length(p.shape) for p in ours]
    assert lengths == [256, None, 256, None, 64, 294]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    references = [AdamW8bit([p], block_size=n or math.inf, **options) for p, n in zip(theirs, lengths, strict=True)]
    optimizer = adamw(ours)
    for step in range(4):
        set_gradients(step, ours, theirs)
        optimizer.step()
        with torch.compiler.set_stance("force_eager"):
            for reference in references:
                reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
    codes = references[0].state[theirs[0]]["exp_avg"]
    assert torch.equal(optimizer.state[ours[0]]["exp_avg"], codes.codes)
    assert torch.equal(optimizer.state[ours[0]]["exp_avg_scale"].flatten(), codes.scale)


def test_32_bit_moments_give_torch_s_own_updates():
    ours, theirs = parameters_of(), parameters_of()
    optimizer = adamw(ours, eight_bit=False)
    reference = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(4):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_rounding_has_no_bias_and_bf16_values_stay():
    """512 draws of 512 values: every mean within 5, the mean of all within 4 standard deviations."""
    values = torch.randn(512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 512)
    draws, total = 512, torch.zeros(512, dtype=torch.float64)
    for salt in range(draws):
        total += round_stochastically(values, random_bits(values, 0, torch.tensor(7.0), salt)).double()
    spacing = 2.0 ** (torch.frexp(values)[1] - 8).double()  # of bf16 at a value: 8 bits of precision
    error = (total / draws - values.double()) / spacing
    assert error.abs().max() < 5 * 0.5 / draws**0.5
    assert abs(error.mean()) < 4 * 0.5 / (draws * 512) ** 0.5
    exact = values.bfloat16().float()
    assert torch.equal(round_stochastically(exact, torch.full((512,), -1, dtype=torch.int32)).float(), exact)


def test_updates_below_a_bf16_step_are_not_lost():
    """50 updates of 1e-4 beneath 1, where bf16's next value is 0.0039 away: 0.995 on the average of 4,096."""
    weights = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = adamw([weights], eight_bit=False, rate=1e-4, decay=0.0)
    weights.grad = torch.ones_like(weights)
    for _ in range(50):
        optimizer.step()
    assert weights.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=2e-4)


def updated(seed=0, order=1) -> list[torch.Tensor]:
    """Parameters after an update; the optimizer has them in this order or the reverse."""
    parameters = parameters_of(torch.bfloat16)
    set_gradients(0, parameters)
    adamw(parameters[::order], eight_bit=False, seed=seed).step()
    return parameters


def test_rounding_is_by_seed_step_parameter_and_place_in_the_whole():
    assert all(torch.equal(a, b) for a, b in zip(updated(), updated(), strict=True))
    assert not torch.equal(updated()[0], updated(seed=1)[0])
    assert not torch.equal(updated()[0], updated(order=-1)[0])  # another parameter's bits
    whole, step = torch.zeros(24, 3, 7), torch.tensor(3.0)
    bits = random_bits(whole, 0, step, 5)
    assert torch.equal(random_bits(whole[10:15], 10 * 21, step, 5), bits[10:15])
    assert not torch.equal(random_bits(whole, 0, step + 1, 5), bits)
    assert (bits & 0xFFFF).unique().numel() > 490  # of 504


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_leaves_weights_moments_and_steps_as_they_were(torchao, dtype):
    ours, straight = parameters_of(dtype), parameters_of(dtype)
    optimizers = [adamw(ours), adamw(straight)]
    for step in (0, None, 1):  # the one between has gradients that are no numbers
        set_gradients(step or 0, ours, straight)
        for parameter in ours if step is None else ():
            parameter.grad[:] = torch.nan
        optimizers[0].found_inf = torch.tensor(float(step is None))
        for optimizer in optimizers[: 1 if step is None else 2]:
            optimizer.step()
    for a, b in zip(ours, straight, strict=True):
        states = optimizers[0].state[a], optimizers[1].state[b]
        assert torch.equal(a, b) and states[0]["step"] == 2
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_states_are_loaded_as_they_were_saved(torchao):
    """torch's own loading would cast them to the parameters' type."""
    parameters, again = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    optimizers = [adamw(parameters), adamw(again)]
    set_gradients(0, parameters, again)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for a, b in zip(parameters, again, strict=True):
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][key]) and value.dtype == optimizers[1].state[b][key].dtype


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_states_are_as_large_as_planned(torchao, name, master):
    model = LlavaNextForConditionalGeneration(tiny_config(hidden_size=64))
    freeze(model, Rates())
    for parameter in model.parameters():
        if master == "bf16" and parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model, Rates(), (0.9, 0.999), 1e-8, 0.0, name)
    optimizer.step()
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [sum(t.nbytes for t in tensors) for tensors in (trained, states)]
    assert list(units(model).trained_bytes(name, master)) == expected
    assert (name == "adamw8bit") == any(t.dtype == torch.uint8 for t in states)


def test_blocks_are_divisors_of_a_row_near_256():
    expected = {(4096, 11008): 256, (32064, 4096): 256, (18944, 3584): 256, (1152, 1152): 288, (1152, 4304): 269}
    expected |= {(1024, 3, 14, 14): 294, (4096, 128): 128, (4096, 16): 16, (4096, 8): None, (4096, 8191): None}
    expected |= {(4096,): None, (63, 64): None, (64, 64): 64}
    assert {shape: block_length(torch.Size(shape)) for shape in expected} == expected


def test_an_unknown_optimizer_is_refused_with_those_there_are():
    given = ["--dry_run", "--model", "m", "--data.sources", "d"]
    for option, names in (("name", ("adamw", "adamw8bit")), ("master", ("fp32", "bf16"))):
        with pytest.raises(ValueError, match=f"(?s)optim.{option}.*{names[0]}.*{names[1]}"):
            parse_run([*given, f"--optim.{option}", "adam4bit"])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rates.llm", "-1", "must be 0 or more, or null to freeze, not -1.0"),
        ("betas", "[0.9, 1.0]", r"must be in \[0, 1\), not \[0.9, 1.0\]"),
        ("eps", "-1", "must be 0 or more, not -1.0"),
        ("max_grad_norm", "0", "must be positive, or null for none, not 0.0"),
        ("max_skipped_steps", "0", "must be positive, not 0"),
    ],
)
def test_values_that_no_update_could_take_are_refused_before_the_model_loads(key, value, said):
    with pytest.raises(ValueError, match=f"optim.{key}: {said}"):
        parse_run(["--dry_run", "--model", "m", "--data.sources", "d", f"--optim.{key}", value])


@pytest.mark.parametrize(
    ("found", "said"), [(None, "is not installed"), ("0.17.0", "torchao 0.17.0 is older than 0.18")]
)
def test_8_bit_moments_without_a_torchao_that_has_them_are_refused(monkeypatch, found, said):
    monkeypatch.setattr(versions, "find_spec", lambda name: found)
    monkeypatch.setattr(versions, "version", lambda name: found)
    config = RunConfig(model="m", run_dir="r", optim=OptimConfig(name="adamw8bit"))
    config.data.sources = [Source("d")]
    with pytest.raises(ValueError, match=rf"^optim.name: adamw8bit .*{said}.*`pip install -c .*\[adamw8bit\]'`"):
        check_run(config)


def test_a_checkpoint_of_another_optimizer_is_refused():
    config = RunConfig(optim=OptimConfig(name="adamw8bit"))
    with pytest.raises(
        ValueError, match=r"optim.name: step-3 was made with adamw, this run has adamw8bit.*Give --optim"
    ):
        check_same_optimizer(config, {"config": {"optim": {}}}, Path("step-3"))
    with pytest.raises(ValueError, match=r"optim.master: step-3 was made with bf16, this run has fp32"):
        check_same_optimizer(RunConfig(), {"config": {"optim": {"master": "bf16"}}}, Path("step-3"))
