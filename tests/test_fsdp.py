"""Real FSDP2 on gloo processes: sharding, dealing and empty ranks change nothing."""

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from tiny import random_samples, stock_loss, tiny_pair

from llava_next.training.loop import slot_weights

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The stock model's loss and gradients for the worker's six samples, and the folder it was loaded from."""
    folder = tmp_path_factory.mktemp("fsdp") / "model"
    _, stock = tiny_pair(folder)
    samples = [*random_samples(1, 5, images=(1, 2)), *random_samples(2, 1, images=(0,))]
    for slot, (example, _) in enumerate(samples):
        example.slot = slot
    supervised = torch.tensor([(e.labels[1:] != -100).sum() for e, _ in samples], dtype=torch.float64)
    loss = stock_loss(stock, samples, slot_weights(supervised, "token"))
    loss.backward()
    return folder, loss.detach(), dict(stock.named_parameters())


@pytest.mark.parametrize(
    ("processes", "frozen"),
    [(1, ()), (2, ()), (2, ("llm", "vision"))],
    ids=["1_rank", "2_ranks_text_only_on_one", "2_ranks_only_the_projector_trains"],
)
def test_loss_and_gradients_equal_stock_on_any_number_of_ranks(reference, tmp_path, processes, frozen):
    folder, loss, parameters = reference
    launch("tests/workers/gradients.py", folder, tmp_path / "out.safetensors", *frozen, processes=processes)
    result = load_file(tmp_path / "out.safetensors")
    assert result["units"] >= 6  # 3 vision and 2 decoder layers and the root: it was sharded, not replicated
    torch.testing.assert_close(result["loss"], loss, rtol=TOLERANCE, atol=TOLERANCE)
    ours = {k.removeprefix("grad/"): v for k, v in result.items() if k.startswith("grad/")}
    trained = {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    if frozen:
        trained = {n for n in trained if "projector" in n or "newline" in n}
    assert set(ours) == trained and len(trained) >= 5
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, parameters[name].grad, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_broadcast_from_rank_0_arrive_bit_equal(reference, tmp_path):
    folder, _, parameters = reference
    launch("tests/workers/gradients.py", folder, tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    weights = {k.removeprefix("weight/"): v for k, v in result.items() if k.startswith("weight/")}
    assert set(weights) == set(parameters)
    assert all(torch.equal(weights[n], p) for n, p in parameters.items())
