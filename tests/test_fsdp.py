"""Real FSDP2 on gloo processes: sharding, dealing and empty ranks change nothing."""

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from tiny import geometry, pairing_config, random_samples, stock_loss, tiny_pair

from llava_next.training.loop import slot_weights
from llava_next.training.optim import module_of

TOLERANCE = 1e-5


def stock_reference(folder, config=None):
    """The stock model's loss and gradients for the worker's six samples, and the folder it was loaded from."""
    _, stock = tiny_pair(folder, config=config)
    anyres = geometry(stock.config)
    samples = [*random_samples(1, 5, images=(1, 2), anyres=anyres), *random_samples(2, 1, images=(0,), anyres=anyres)]
    for slot, (example, _) in enumerate(samples):
        example.slot = slot
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    loss = stock_loss(stock, samples, slot_weights(supervised, "token"))
    loss.backward()
    return folder, loss.detach(), dict(stock.named_parameters())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """CLIP with a small Llama."""
    return stock_reference(tmp_path_factory.mktemp("fsdp") / "model")


@pytest.fixture(scope="module")
def siglip_qwen2(tmp_path_factory):
    """SigLIP with Qwen2, by whether embedding and head are one: no CLS, a pooling head, biases, 7 queries a key."""
    names = ("google/siglip-so400m-patch14-384", "Qwen/Qwen2-7B-Instruct")
    folder = tmp_path_factory.mktemp("fsdp")
    return {tied: stock_reference(folder / str(tied), pairing_config(*names, tied)) for tied in (False, True)}


@pytest.mark.parametrize(
    ("processes", "frozen"),
    [(1, ()), (2, ()), (4, ()), (2, ("llm", "vision"))],
    ids=["1_rank", "2_ranks_text_only_on_one", "4_ranks", "2_ranks_only_the_projector_trains"],
)
def test_loss_and_gradients_equal_stock_on_any_number_of_ranks(reference, tmp_path, processes, frozen):
    assert_equal_to_stock(reference, tmp_path, processes, frozen)


@pytest.mark.parametrize(
    ("processes", "frozen", "tied"),
    [(1, (), True), (2, ("vision",), False), (2, (), True), (4, (), False)],
    ids=["1_rank_tied", "2_ranks_frozen_tower", "2_ranks_tied", "4_ranks"],
)
def test_siglip_with_qwen2_equals_stock_on_any_number_of_ranks(siglip_qwen2, tmp_path, processes, frozen, tied):
    result = assert_equal_to_stock(siglip_qwen2[tied], tmp_path, processes, frozen)
    assert ("grad/lm_head.weight" in result) != tied
    parameters = siglip_qwen2[tied][2]
    assert all(torch.equal(result[f"weight/{name}"], p) for name, p in parameters.items())


def assert_equal_to_stock(reference, tmp_path, processes: int, frozen: tuple[str, ...]) -> dict[str, torch.Tensor]:
    folder, loss, parameters = reference
    launch("tests/workers/gradients.py", folder, tmp_path / "out.safetensors", *frozen, processes=processes)
    result = load_file(tmp_path / "out.safetensors")
    assert result["units"] >= 6  # 3 vision and 2 decoder layers and the root: it was sharded, not replicated
    torch.testing.assert_close(result["loss"], loss, rtol=TOLERANCE, atol=TOLERANCE)
    ours = {k.removeprefix("grad/"): v for k, v in result.items() if k.startswith("grad/")}
    trained = {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    trained = {n for n in trained if module_of(n) not in frozen}
    assert set(ours) == trained and len(trained) >= 5
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, parameters[name].grad, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    return result


def test_weights_broadcast_from_rank_0_arrive_bit_equal(reference, tmp_path):
    folder, _, parameters = reference
    launch("tests/workers/gradients.py", folder, tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    weights = {k.removeprefix("weight/"): v for k, v in result.items() if k.startswith("weight/")}
    assert set(weights) == set(parameters)
    assert all(torch.equal(weights[n], p) for n, p in parameters.items())
