"""Real FSDP2 on gloo processes: sharding, dealing, empty ranks change nothing; the launch file's keys have effect."""

import functools
import json
import math
import os

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file

from llava_next.model.forward.lora import Lora, is_adapter
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration, unused_parameters
from llava_next.training.devices import launch as launch_file
from llava_next.training.devices.agreement import slot_weights
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.recipe.low_memory import block_length
from llava_next.training.recipe.optim import module_of
from support.kinds import ON_REQUEST, kind_config
from support.launching import ROOT, launch
from support.tiny import (
    WIDE,
    geometry,
    gradients,
    pack_tiny,
    pairing_config,
    random_samples,
    stock_loss,
    tiny_config,
    tiny_pair,
    with_adapters,
)
from support.tracing import find_torchao, has_torchao
from support.workers.gradients import samples_of

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


@pytest.fixture(scope="module")
def other_kinds(tmp_path_factory):
    """Rows of `KINDS`, made when asked for."""
    folder = tmp_path_factory.mktemp("fsdp")
    return functools.cache(lambda name: stock_reference(folder / name, kind_config(name)))


LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Called with how matrices are kept: folder of a model, loss and gradients of a step with adapters on it."""
    folder = tmp_path_factory.mktemp("adapted") / "model"
    tiny_pair(folder, config=tiny_config(**WIDE))

    @functools.cache
    def of(quantize: str | None):
        model = with_adapters(LlavaNextForConditionalGeneration.from_pretrained(folder), Lora(**LORA), quantize)
        examples = [e for e, _ in samples_of(geometry(model.config))]
        supervised = torch.tensor([(e.labels[1:] != -100).sum() for e in examples], dtype=torch.float64)
        batch = pack_tiny(examples).weighted(slot_weights(supervised, "token"))
        loss = model(**batch.model_inputs(torch.device("cpu")), num_sources=2).loss
        loss.backward()
        return folder, loss.detach(), gradients(model)

    return of


def assert_equal_to_one_process(result: dict[str, torch.Tensor], expected) -> None:
    """One step of the worker with adapters equals that of one process, without FSDP2."""
    _, loss, theirs = expected
    ours = {k.removeprefix("grad/"): v for k, v in result.items() if k.startswith("grad/")}
    assert ours.keys() == theirs.keys() and sum(is_adapter(name) for name in ours) == 2 * 7 * 2
    for name, value in {**theirs, "loss": loss}.items():
        found = ours.get(name, result["loss"])
        torch.testing.assert_close(found, value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


# number of ranks: what its launch takes a step of, as (architecture; tied or not, or another kind; frozen modules)
CASES = {
    1: [("llama", False, ()), ("qwen2", False, ("vision",))],
    2: [("llama", False, ()), ("llama", False, ("llm", "vision")), ("qwen2", True, ())],
    4: [("llama", False, ()), ("qwen2", False, ())],
}
for ranks in (1, 2) if len(ON_REQUEST) > 1 else (2,):
    CASES[ranks] += [("qwen2", name, ()) for name in ON_REQUEST]
UPDATED = (1, 2)  # on so many ranks all that trains of the first is updated as well, with moments in 8 bits


@pytest.fixture(scope="module")
def steps(tmp_path_factory, reference, siglip_qwen2, other_kinds):
    """What the worker wrote of one step, one launch for all of `CASES`: `steps(2, "llama", frozen=("vision",))`."""

    def folder_of(model, tied):
        if model == "llama":
            return reference[0]
        return (other_kinds(tied) if isinstance(tied, str) else siglip_qwen2[tied])[0]

    @functools.cache
    def of(processes: int) -> dict:
        folder, jobs = tmp_path_factory.mktemp("steps"), {}
        for model, tied, frozen in CASES[processes]:
            updated = processes in UPDATED and not jobs and has_torchao()
            updates = [None, None, "adamw8bit"] if updated else []
            out = folder / f"{len(jobs)}.safetensors"
            jobs[model, tied, frozen] = (folder_of(model, tied), out, frozen, "full", *updates)
        run_worker(list(jobs.values()), processes)
        return {case: load_file(job[1]) for case, job in jobs.items()}

    return lambda processes, model, tied=False, frozen=(): of(processes)[model, tied, frozen]


def run_worker(jobs: list[tuple], processes: int = 2, config: str | None = None) -> None:
    """Steps of (model folder, file for the result, frozen modules, checkpointing, ...) in one launch."""
    launch("tests/support/workers/gradients.py", json.dumps(jobs, default=str), processes=processes, config=config)


@pytest.mark.parametrize(
    ("processes", "frozen"),
    [(1, ()), (2, ()), (4, ()), (2, ("llm", "vision"))],
    ids=["1_rank", "2_ranks_text_only_on_one", "4_ranks", "2_ranks_only_the_projector_trains"],
)
def test_loss_and_gradients_equal_stock_on_any_number_of_ranks(reference, steps, processes, frozen):
    result = steps(processes, "llama", frozen=frozen)
    assert_equal_to_stock(result, reference, frozen)
    # 3 vision and 2 decoder layers, embedding, norm with head, root: it was sharded, not replicated. Not resharded:
    # between forward and backward 4 layers hold whole weights, all but the vision layer that nobody calls
    assert (result["units"], result["mesh"].tolist()) == (8, [processes])
    assert (result["gathered"], result["checkpointed"]) == (4, 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_8_bit_updates_of_shards_are_torchao_s_own(reference, steps, processes):
    """Three updates by the same gradient. A moment between two codes may become the other one by its last bit."""
    find_torchao()
    pytest.importorskip("torchao", reason="torchao is neither installed nor where LLAVA_NEXT_TORCHAO says")
    from torchao.optim import AdamW8bit

    result, coded = steps(processes, "llama"), 0
    for name, parameter in reference[2].items():
        if parameter.grad is None:
            continue
        expected = torch.nn.Parameter(parameter.detach().clone())
        expected.grad, length = parameter.grad, block_length(parameter.shape)
        optimizer = AdamW8bit([expected], lr=1e-3, weight_decay=0.0, block_size=length or math.inf)
        for _ in range(3):
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        error = (result[f"updated/{name}"] - expected).abs()
        assert (error > TOLERANCE).float().mean() < 1e-3 and error.max() < 1e-4, name
        coded += length is not None
    assert coded == 9


@pytest.mark.parametrize(
    ("processes", "frozen", "tied"),
    [(1, ("vision",), False), (2, (), True), (4, (), False)],
    ids=["1_rank_frozen_tower", "2_ranks_tied", "4_ranks"],
)
def test_siglip_with_qwen2_equals_stock_on_any_number_of_ranks(siglip_qwen2, steps, processes, frozen, tied):
    result = steps(processes, "qwen2", tied, frozen)
    assert_equal_to_stock(result, siglip_qwen2[tied], frozen)
    assert ("grad/lm_head.weight" in result) != tied
    parameters = siglip_qwen2[tied][2]
    assert all(torch.equal(result[f"weight/{name}"], p) for name, p in parameters.items())


@pytest.mark.parametrize("processes", [1, 2] if len(ON_REQUEST) > 1 else [2])
@pytest.mark.parametrize("name", ON_REQUEST)
def test_other_kinds_equal_stock_on_one_and_two_ranks(other_kinds, steps, name, processes):
    result, reference = steps(processes, "qwen2", name), other_kinds(name)
    assert_equal_to_stock(result, reference)
    assert all(torch.equal(result[f"weight/{name}"], p) for name, p in reference[2].items())


def assert_equal_to_stock(result: dict[str, torch.Tensor], reference, frozen: tuple[str, ...] = ()) -> None:
    """One step of the worker equals the stock model: loss, every gradient, gradient norm."""
    _, loss, parameters = reference
    torch.testing.assert_close(result["loss"], loss, rtol=TOLERANCE, atol=TOLERANCE)
    ours = {k.removeprefix("grad/"): v for k, v in result.items() if k.startswith("grad/")}
    trained = {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    trained = {n for n in trained if module_of(n) not in frozen}
    assert set(ours) == trained and len(trained) >= 5
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, parameters[name].grad, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    norm = torch.stack([parameters[n].grad.double().norm() for n in trained]).norm()
    assert result["grad_norm"].item() == pytest.approx(norm.item(), rel=TOLERANCE)


def test_the_launch_file_of_the_gpus_trains_fp32_masters_in_bf16(reference, tmp_path):
    """bf16 on two CPU ranks: what trains and its gradients are fp32, what is frozen stays bf16; both near fp32's."""
    folder, loss, parameters = reference
    gpus, outs = ROOT / "accelerate_configs/h100x8_fsdp.yaml", [tmp_path / name for name in ("fp32", "bf16")]
    run_worker([(folder, out, ("vision",), "full", None, None, "adamw", out.name) for out in outs], config=str(gpus))
    result, in_bf16 = map(load_file, outs)
    assert_near_in_bf16(result, in_bf16)
    assert result["loss"].dtype == torch.float32 and result["loss"].item() == pytest.approx(loss.item(), rel=2e-3)
    dtypes = {name: torch.bfloat16 if module_of(name) == "vision" else torch.float32 for name in parameters}
    unused = unused_parameters(LlavaNextForConditionalGeneration.from_pretrained(folder))
    dtypes |= dict.fromkeys(unused, torch.bfloat16)
    assert {name: result[f"weight/{name}"].dtype for name in parameters} == dtypes
    assert (result["units"], result["gathered"], result["checkpointed"]) == (8, 0, 5)
    ours = {k.removeprefix("grad/"): v for k, v in result.items() if k.startswith("grad/")}
    assert {v.dtype for v in ours.values()} == {torch.float32} and len(ours) >= 5
    for name, gradient in ours.items():
        exact = parameters[name].grad
        assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.999, name
        assert gradient.norm() / exact.norm() == pytest.approx(1, abs=0.01), name


def assert_near_in_bf16(result: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """bf16 masters beside fp32 ones: the same forward, gradients rounded but fp32, weights three roundings away."""
    assert torch.equal(ours["loss"], result["loss"])
    assert {ours[name].dtype for name in result if name.startswith(("weight/", "updated/"))} == {torch.bfloat16}
    for name in [name.removeprefix("grad/") for name in result if name.startswith("grad/")]:
        ours_grad, gradient = ours[f"grad/{name}"], result[f"grad/{name}"]
        assert ours_grad.dtype == torch.float32
        assert (ours_grad - gradient).abs().max() <= 2**-7 * gradient.abs().max(), name
        weights, exact = ours[f"updated/{name}"].float(), result[f"updated/{name}"]
        # and where a gradient is rounding alone, Adam's three updates of 1e-3 may go the other way
        assert ((weights - exact).abs() <= 3 * 2**-7 * exact.abs() + 6e-3).all(), name


def test_weights_broadcast_from_rank_0_arrive_bit_equal(reference, steps):
    parameters, result = reference[2], steps(2, "llama")
    weights = {k.removeprefix("weight/"): v for k, v in result.items() if k.startswith("weight/")}
    assert set(weights) == set(parameters)
    assert all(torch.equal(weights[n], p) for n, p in parameters.items())


def launch_yaml(folder, top=None, hsdp=None, **fsdp) -> str:
    """Path of the shipped CPU launch file with changed keys.

    Args:
        top: keys of the file; `fsdp` those below `fsdp_config`, without the prefix.
        hsdp: (dp_replicate_size, dp_shard_size).
    """
    config = yaml.safe_load((ROOT / "accelerate_configs/cpu2_fsdp.yaml").read_text()) | (top or {})
    config["fsdp_config"] |= {f"fsdp_{key}": value for key, value in fsdp.items()}
    if hsdp:
        names = ("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size")
        config["parallelism_config"] = dict(zip(names, hsdp, strict=True))
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_hsdp_on_2x2_ranks_equals_one_process_with_adapters_too(reference, adapted, tmp_path):
    config = launch_yaml(tmp_path, hsdp=(2, 2), activation_checkpointing=True, reshard_after_forward=True)
    jobs = [(reference[0], tmp_path / "out.safetensors", (), "full")]
    outs = {quantize: tmp_path / f"{quantize}.safetensors" for quantize in (None, "nf4")}
    jobs += [(adapted(quantize)[0], out, (), "selective", LORA, quantize) for quantize, out in outs.items()]
    run_worker(jobs, 4, config)
    for quantize, out in outs.items():  # the bytes of 4-bit matrices are gathered as they were
        assert_equal_to_one_process(load_file(out), adapted(quantize))
    result = load_file(tmp_path / "out.safetensors")
    assert_equal_to_stock(result, reference)
    assert (result["units"], result["mesh"].tolist()) == (8, [2, 2])
    weights = {k.removeprefix("weight/"): v for k, v in result.items() if k.startswith("weight/")}
    assert all(torch.equal(weights[n], p) for n, p in reference[2].items())


RESHARDED = {"reshard_after_forward": True, "activation_checkpointing": True}


@pytest.mark.parametrize(
    ("keys", "checkpointing", "units", "gathered", "checkpointed"),
    [
        # one decoder layer keeps its input only, the other is selective: both are units
        ({**RESHARDED, "cpu_ram_efficient_loading": False}, 1, 8, 0, 5),
        # the 3 vision layers belong to the root unit then, which is never resharded
        (
            {**RESHARDED, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
            "selective",
            5,
            3,
            5,
        ),
    ],
    ids=["resharded_checkpointed", "one_layer_class_selective"],
)
def test_editing_the_launch_file_has_effect_and_changes_no_result(
    reference, tmp_path, keys, checkpointing, units, gathered, checkpointed
):
    out = tmp_path / "out.safetensors"
    run_worker([(reference[0], out, (), checkpointing)], config=launch_yaml(tmp_path, **keys))
    result = load_file(out)
    assert_equal_to_stock(result, reference)
    assert [result[name].item() for name in ("units", "gathered", "checkpointed")] == [units, gathered, checkpointed]


def apply_launch_file(monkeypatch, path: str) -> None:
    """Sets the environment that `accelerate launch` would give its processes, by Accelerate's own translation."""
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))]:
        monkeypatch.delenv(name)
    options = ["--config_file", path, "--main_process_port", str(get_free_port())]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(arguments.num_processes))


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_launch_files_are_accepted_and_mean_what_they_say(monkeypatch, config):
    apply_launch_file(monkeypatch, str(config))
    launch_file.check_launch(on_meta)
    plugin, gpu = FullyShardedDataParallelPlugin(), not config.stem.startswith("cpu")
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, gpu, gpu)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("bf16" if gpu else "no")
    assert launch_file.hsdp_sizes() == ((4, 8) if "hsdp" in config.stem else None)


@pytest.mark.parametrize(
    ("top", "fsdp", "expected"),
    [
        ({}, {"version": 1, "reshard_after_forward": "FULL_SHARD"}, "set `fsdp_version: 2`"),
        ({"mixed_precision": "fp16"}, {}, "mixed_precision: fp16"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, {}, "dynamo_backend: INDUCTOR"),
        ({}, {"auto_wrap_policy": "SIZE_BASED_WRAP"}, "set TRANSFORMER_BASED_WRAP"),
        ({}, {"state_dict_type": "FULL_STATE_DICT"}, "set SHARDED_STATE_DICT"),
        ({}, {"sharding_strategy": "SHARD_GRAD_OP"}, "set fsdp_reshard_after_forward"),
        ({}, {"reshard_after_forward": "FULL_SHARD"}, "invalid truth value full_shard"),
        ({}, {"forward_prefetch": True}, "fsdp_forward_prefetch: true"),
        ({}, {"backward_prefetch": "BACKWARD_PRE"}, "fsdp_backward_prefetch: BACKWARD_PRE"),
        ({}, {"use_orig_params": False}, "fsdp_use_orig_params: false"),
        ({}, {"sync_module_states": False, "cpu_ram_efficient_loading": False}, "fsdp_sync_module_states: false"),
        ({}, {"ignored_modules": ".*vision.*"}, "fsdp_ignored_modules: .*vision.*"),
        ({}, {"offload_params": True}, "fsdp_offload_params: true: there is no GPU"),
        ({}, {"activation_checkpointing_offload": True}, "requires `activation_checkpointing=True`"),
        ({}, {"transformer_layer_cls_to_wrap": "CLIPTextLayer"}, "its layers are CLIPEncoderLayer, LlamaDecoderLayer"),
        ({}, {"transformer_layer_cls_to_wrap": "LlamaModel"}, "LlamaModel is no layer of this model"),
        ({"parallelism_config": {"parallelism_config_dp_replicate_size": 2}}, {}, "dp_shard_size 1 shards nothing"),
        (
            {"parallelism_config": {"parallelism_config_dp_shard_size": 8}},
            {},
            "1 x dp_shard_size 8 is not the 2 processes",
        ),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, {}, "parallelism_config_tp_size: 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_launch_file_that_cannot_work_is_refused_before_the_model_loads(monkeypatch, tmp_path, top, fsdp, expected):
    apply_launch_file(monkeypatch, launch_yaml(tmp_path, top, **fsdp))
    with pytest.raises(ValueError) as refused:
        launch_file.check_launch(on_meta)
    assert expected in str(refused.value)


def on_meta():
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(tiny_config())


@pytest.mark.parametrize("policy", ["full", "selective", 1])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_checkpointing_changes_no_bit_and_selective_recomputes_no_matrix_product(policy, offload):
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(tiny_config())
    model.set_attn_implementation({"text_config": "segment_loop", "vision_config": "sdpa"})
    examples = [e for e, _ in random_samples(1, 4, images=(0, 1, 2))]
    batch = pack_tiny(examples).weighted(torch.full((4,), 0.01)).model_inputs(torch.device("cpu"))

    def step():
        model.zero_grad()
        loss = model(**batch, num_sources=2).loss
        with CountMatmuls() as counted:
            loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss, gradients, counted.matmuls

    loss, expected, plain = step()
    apply_checkpointing(model, policy, offload)
    again, ours, recomputed = step()
    assert torch.equal(loss, again) and set(ours) == set(expected) and len(ours) > 50
    assert all(torch.equal(gradient, ours[name]) for name, gradient in expected.items())
    # 7 linear maps in each of 2 decoder layers and 6 in each of the 2 vision layers in use; nobody needs the last one's
    assert recomputed - plain == {"full": 2 * 6 + 2 * 5, 1: 6, "selective": 0}[policy]


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products with weights."""

    matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.matmuls += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["most", 0, 2, True])
def test_unknown_checkpointing_policy_is_named(policy):
    with pytest.raises(ValueError, match=f"{policy!r} is none of full, selective, none, 1 to 1 layers"):
        apply_checkpointing(on_meta(), policy)
