"""The packed forward against stock transformers and against the original code's results."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_next.anyres import AnyRes
from llava_next.data.loading.batch import Example, pack
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, unused_parameters
from llava_next.training.devices.agreement import slot_weights
from support.tiny import ANYRES, gradients, pack_tiny, random_samples, stock_logits, stock_loss, tiny_config, tiny_pair

GOLDEN = Path(__file__).parents[1] / "data" / "tiny_model"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("tiny") / "model")


def assert_same_gradients(model, reference, tolerance=TOLERANCE):
    ours, theirs = gradients(model), gradients(reference)
    assert len(ours) > 30
    for name, gradient in ours.items():
        expected = theirs.pop(name, None)
        if expected is None:
            # transformers runs no tower on text; ours runs it on a zero tile with weight 0
            assert gradient.abs().max() == 0, name
            continue
        torch.testing.assert_close(
            gradient, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not {n for n, g in theirs.items() if g.abs().max() > 0}


@pytest.mark.parametrize("seed", range(4))
def test_packed_loss_and_every_gradient_equal_stock_transformers_one_by_one(pair, seed):
    model, stock = pair
    samples = random_samples(seed, count=7)
    batch = pack_tiny([e for e, _ in samples])
    weights = slot_weights(torch.tensor(batch.supervised, dtype=torch.float64), "token")
    model.zero_grad(), stock.zero_grad()
    output = model(**batch.weighted(weights).model_inputs(torch.device("cpu")), num_sources=2)
    output.loss.backward()
    expected = stock_loss(stock, samples, weights)
    expected.backward()
    assert batch.num_tiles > 5
    torch.testing.assert_close(output.loss, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same_gradients(model, stock)
    assert output.source_tokens.sum() == sum(batch.supervised)
    torch.testing.assert_close(output.source_loss.sum() / sum(batch.supervised), expected.detach())


def test_packed_logits_equal_stock_transformers_for_every_sample(pair):
    model, stock = pair
    samples = random_samples(11, count=6)
    batch = pack_tiny([e for e, _ in samples])
    with torch.no_grad():
        embeds = model.model.language_model.embed_tokens(batch.input_ids)
        features = model.image_features(batch.tiles)[batch.feature_index]
        embeds = embeds.index_copy(0, batch.image_positions, features)
        hidden = model.decode_segments(embeds, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        logits = model.lm_head(hidden).split([len(e.input_ids) for e, _ in samples])
        for ours, (example, sizes) in zip(logits, samples, strict=True):
            torch.testing.assert_close(ours, stock_logits(stock, example, sizes), rtol=TOLERANCE, atol=TOLERANCE)


def test_stock_forward_of_the_subclass_equals_stock_transformers(pair):
    model, stock = pair
    example, sizes = random_samples(5, count=1, images=(2,))[0]
    torch.testing.assert_close(stock_logits(model, example, sizes), stock_logits(stock, example, sizes))


def test_text_only_batch_has_the_text_loss_and_zero_gradients_in_tower_and_projector(pair):
    model, stock = pair
    samples = random_samples(3, count=4, images=(0,))
    batch = pack_tiny([e for e, _ in samples])
    assert batch.num_tiles == 0 and batch.tiles.shape[0] == 1
    weights = torch.full((4,), 0.1)
    model.zero_grad(), stock.zero_grad()
    loss = model(**batch.weighted(weights).model_inputs(torch.device("cpu")), num_sources=2).loss
    loss.backward()
    torch.testing.assert_close(loss, stock_loss(stock, samples, weights), rtol=TOLERANCE, atol=TOLERANCE)
    dead = unused_parameters(model)
    tower = {n: p for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n}
    assert len(tower) > 20
    assert all((p.grad is None) if n in dead else (p.grad.abs().max() == 0) for n, p in tower.items())


def test_empty_batch_gives_zero_loss_and_zero_gradient_everywhere(pair):
    model, _ = pair
    batch = pack_tiny([])
    model.zero_grad()
    weighted = batch.weighted(torch.ones(8))
    output = model(**weighted.model_inputs(torch.device("cpu")), num_sources=2)
    output.loss.backward()
    assert output.loss == 0 and output.source_tokens.sum() == 0 and batch.num_tokens == 0
    reached = gradients(model)
    assert set(reached) == {n for n, _ in model.named_parameters()} - unused_parameters(model)
    assert max(g.abs().max() for g in reached.values()) == 0


def test_packed_forward_refuses_attention_that_would_mix_samples():
    model = LlavaNextForConditionalGeneration(tiny_config())
    batch = pack_tiny([e for e, _ in random_samples(0, 2)])
    with pytest.raises(ValueError, match="segment attention"):
        model(**batch.model_inputs(torch.device("cpu")), num_sources=2)


def test_unused_parameters_are_the_last_vision_layer_and_the_final_norm(pair):
    model, _ = pair
    names = unused_parameters(model)
    assert len(names) == 18  # 16 in a CLIP layer, 2 in post_layernorm
    assert all("layers.2." in n or "post_layernorm" in n for n in names)


def test_loss_is_the_same_in_chunks_of_the_head(pair, monkeypatch):
    model, _ = pair
    batch = pack_tiny([e for e, _ in random_samples(7, count=6)])
    results = []
    for chunk in (1024, 13):
        monkeypatch.setattr("llava_next.model.forward.head.CHUNK", chunk)
        model.zero_grad()
        loss = model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=TOLERANCE, atol=TOLERANCE)


def golden_examples(name: str) -> tuple[list[Example], dict, dict, AnyRes]:
    """The original's padded batch as our unpadded samples."""
    index = json.loads((GOLDEN / "index.json").read_text())
    case = index["batches"][name]
    tensors = load_file(GOLDEN / "batches" / f"{name}.safetensors")
    anyres = AnyRes(28, 14, [tuple(p) for p in index["meta"]["pinpoints_in_config_hw"]])
    sizes, counts = iter(case["image_sizes_wh"]), iter(case["tiles_per_image"])
    all_tiles, tile_start, examples = tensors["tiles_uint8"].permute(0, 2, 3, 1), 0, []
    for slot, (ids, labels, mask) in enumerate(
        zip(tensors["input_ids"], tensors["labels"], tensors["attention_mask"].bool(), strict=True)
    ):
        ids, labels = ids[mask], labels[mask]
        tiles, index_of, new_ids, new_labels = all_tiles[:0], torch.zeros(0, dtype=torch.long), [], []
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if token != -200:
                new_ids.append(token), new_labels.append(label)
                continue
            count = next(counts)
            tiles, tile_start = all_tiles[tile_start : tile_start + count], tile_start + count
            index_of = torch.from_numpy(anyres.feature_index(*next(sizes)))
            new_ids += [500] * len(index_of)
            new_labels += [-100] * len(index_of)
        ids = torch.tensor(new_ids).numpy()
        examples.append(
            Example(slot, slot, 0, ids, torch.tensor(new_labels).numpy(), tiles.numpy(), index_of.numpy(),
                    (torch.tensor(new_ids) == 500).nonzero()[:, 0].numpy())
        )  # fmt: skip
    return examples, case, tensors, anyres


def module_norm(model, group: str):
    """L2 norm of the gradients of a module group as the golden names it; None when it has none."""
    prefix = {
        "vision_tower": "model.vision_tower.",
        "multi_modal_projector": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
        "lm_head": "lm_head.",
    }.get(group)
    if prefix is None:
        if group.startswith("vision_tower."):
            prefix = "model.vision_tower." + group.removeprefix("vision_tower.").replace("layers.", "encoder.layers.")
        elif group.startswith("multi_modal_projector."):
            prefix = f"model.{group}."
        else:
            prefix = f"model.language_model.{group}."
    found = [p.grad for n, p in model.named_parameters() if n.startswith(prefix) and p.grad is not None]
    return torch.stack([g.norm() for g in found]).norm().item() if found else None


@pytest.mark.parametrize("name", ["single", "mixed_text_only"])
def test_original_code_gives_the_same_loss_logits_and_gradient_norms(name):
    model = LlavaNextForConditionalGeneration.from_pretrained(GOLDEN)
    examples, case, tensors, anyres = golden_examples(name)
    batch = pack(examples, 28, anyres.patches_per_tile)
    assert [len(e.input_ids) for e in examples] == case["merged_lengths"]
    assert sum(batch.supervised) == case["n_supervised"]
    weights = torch.full((len(examples),), 1.0 / case["n_supervised"])
    loss = model(**batch.weighted(weights).model_inputs(torch.device("cpu"))).loss
    loss.backward()
    assert loss.item() == pytest.approx(float(case["loss"]), abs=TOLERANCE)
    assert len(case["grad_norms"]) == 16
    for group, norm in case["grad_norms"].items():
        ours = module_norm(model, group)
        assert (ours is None) if norm is None else ours == pytest.approx(float(norm), rel=TOLERANCE), group
    starts = batch.cu_seqlens[:-1].tolist()
    with torch.no_grad():
        embeds = model.model.language_model.embed_tokens(batch.input_ids)
        features = model.image_features(batch.tiles)[batch.feature_index]
        embeds = embeds.index_copy(0, batch.image_positions, features)
        logits = model.lm_head(model.decode_segments(embeds, batch.position_ids, batch.cu_seqlens, batch.max_seqlen))
    for (row, position), expected in zip(tensors["logit_positions"].tolist(), tensors["logits"], strict=True):
        torch.testing.assert_close(logits[starts[row] + position], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_published_layout_loads_with_no_missing_or_unexpected_key():
    _, info = LlavaNextForConditionalGeneration.from_pretrained(GOLDEN, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_tiny_geometry_covers_every_grid():
    sizes = [s for _, sizes in random_samples(0, 200) for s in sizes]
    assert {ANYRES.grid(*s) for s in sizes} == {(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)}
