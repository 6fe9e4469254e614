"""The GPU's step on a machine without one: fake tensors of another device than the CPU, in bf16, by the GPU's kernels.

Nothing is computed: shapes, dtypes, devices and strides are followed, a value that the host would wait for cannot be
had, and tensors of two devices do not mix.
"""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llava_next.model.folders.dry import LLMS, TOWERS
from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.lora import Lora, add_adapters
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices import float8
from llava_next.training.devices.float8 import use_float8
from llava_next.training.devices.launch import layer_stacks
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.recipe.optim import AdaptedRates, Rates, build_optimizer, freeze
from llava_next.training.watch.health import NonFinite
from support.published import CLIP, LLAMA3, STAGE_1
from support.tiny import geometry, pack_tiny, pairing_config, random_samples
from support.tracing import find_torchao

DEVICE = torch.device("meta")  # fake CUDA tensors abort the CPU build in backward
POLICIES = ("none", "selective", "full", 1)


class OnTheDevice(TorchDispatchMode):
    """Checks every operation: it makes nothing on the CPU, and kernels are called with what they take."""

    attention = updates = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device == DEVICE, f"{function} makes {tuple(tensor.shape)} on {tensor.device}"
        if function.name() == "torch_attn::_varlen_attn":
            self.attention += 1
            check_attention(*args[:4])
        self.updates += function.name() == "aten::_fused_adamw_"
        return made


def check_attention(query, key, value, cu_seqlens) -> None:
    """What torch's variable-length kernel takes on CUDA; `[T, heads, head_dim]` each."""
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous(), f"borders are {cu_seqlens.dtype}"
    for tensor in (query, key, value):
        assert tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1, f"{tensor.dtype}, {tensor.stride()}"
        assert tensor.ndim == 3 and tensor.shape[-1] <= 256
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape


def checked_float8_product(products: list, product=torch._scaled_mm):
    """`torch._scaled_mm` that checks what it takes on CUDA: rows by columns, sides of 16, scales in float32.

    Inside of torchao's tensors, where no dispatch mode looks.
    """

    def call(left, right, **options):
        check_float8_product(left, right, options["scale_a"], options["scale_b"])
        products.append(left.device)
        return product(left, right, **options)

    return call


def check_float8_product(left, right, left_scale, right_scale) -> None:
    assert left.stride(1) == right.stride(0) == 1, f"{left.stride()} by {right.stride()}"
    assert left.shape[1] % 16 == right.shape[1] % 16 == 0, f"{tuple(left.shape)} by {tuple(right.shape)}"
    assert {left.dtype, right.dtype} <= {torch.float8_e4m3fn, torch.float8_e5m2}
    assert left_scale.dtype == right_scale.dtype == torch.float32


def model_of(config, rates: Rates, policy, device=DEVICE) -> LlavaNextForConditionalGeneration:
    """A model whose weights are fake, in bf16 as FSDP2 gathers them. Called under a FakeTensorMode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlavaNextForConditionalGeneration(config).train()
            if rates.lora:
                add_adapters(model, rates.lora, seed=0)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(attention_names("varlen"))
    freeze(model, rates)
    apply_checkpointing(model, policy)
    return model


def batches_of(config) -> list:
    """Pictures and text, text alone, nothing."""
    anyres = geometry(config)
    mixed, text = ([e for e, _ in random_samples(3, 3, images=n, anyres=anyres)] for n in ((1, 2), (0,)))
    weights = torch.full((3,), 0.1)
    return [pack_tiny(samples, anyres).weighted(weights) for samples in (mixed, text, [])]


def on_device(mode: FakeTensorMode, batch, device=DEVICE) -> dict:
    """The model's inputs as fake tensors on the device."""
    inputs = batch.model_inputs(torch.device("cpu"))
    return {k: mode.from_tensor(v).to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def rehearse(model, inputs: dict, rates: Rates) -> None:
    """Forward, backward, clipping and the update, on which the device decides."""
    with OnTheDevice() as watched:
        loss = model(**inputs, num_sources=2).loss
        assert loss.dtype == torch.float32 and loss.shape == ()
        loss.backward()
        for parameter in model.parameters():  # FSDP2's shards, unlike what it gathers of them, are fp32
            if parameter.requires_grad:
                gradient, parameter.grad = parameter.grad.float(), None
                parameter.data = parameter.data.float()
                parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with mock.patch.object(adam, "_device_dtype_check_for_fused"):  # it knows no meta device
            optimizer = build_optimizer(model, rates, (0.9, 0.999), 1e-8, 0.0)
            NonFinite.guard(optimizer, norm)
            optimizer.step()
    assert watched.attention >= model.config.text_config.num_hidden_layers
    assert watched.updates == len(optimizer.param_groups)


PAIRINGS = list(itertools.product(TOWERS, LLMS))
BESIDES = {1: "float8", 4: "float8", 3: "lora", 6: "lora"}  # by number of the pairing, each with two policies


@pytest.mark.parametrize("number", range(len(PAIRINGS)), ids=lambda n: " ".join(p.split("/")[1] for p in PAIRINGS[n]))
def test_step_of_every_pairing_stays_on_the_device(number, monkeypatch):
    """Some with float8 products, some with adapters."""
    if BESIDES.get(number) == "float8":
        find_torchao()
        pytest.importorskip("torchao", reason="torchao is neither installed nor where LLAVA_NEXT_TORCHAO says")
        monkeypatch.setattr(float8, "check_device", lambda device: None)
    products = []
    monkeypatch.setattr(torch, "_scaled_mm", checked_float8_product(products))
    tower, llm = PAIRINGS[number]
    config, besides, rates = pairing_config(tower, llm), BESIDES.get(number), Rates()
    if besides == "lora":
        rates = AdaptedRates(vision=None, lora=Lora(r=4, dropout=0.1))
    batch = batches_of(config)[0]
    with FakeTensorMode() as mode:
        model = model_of(config, rates, POLICIES[number % len(POLICIES)])
        swapped = use_float8(model) if besides == "float8" else 0
        rehearse(model, on_device(mode, batch), rates)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert len(products) >= 3 * swapped and bool(swapped) == (besides == "float8") and set(products) <= {DEVICE}


class Collectives(TorchDispatchMode):
    """Notes collectives in their order."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "fsdp"):
            self.called.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def rank_of_two():
    """The mesh of a process group whose other rank is imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("rates", [Rates(), STAGE_1], ids=["all", "stage_1"])
def test_order_of_collectives_and_gradients_is_the_same_whatever_the_samples_are(rank_of_two, rates):
    """A rank with pictures, one with text, an idle one. FSDP2 wants a device that is there: fake CPU tensors."""
    config, device = pairing_config(CLIP, LLAMA3), torch.device("cpu")
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    found = []
    with FakeTensorMode() as mode:
        model = model_of(config, rates, "selective", device)
        for unit in (*itertools.chain(*layer_stacks(model)), model.get_input_embeddings(), model.lm_head, model):
            fully_shard(unit, mesh=rank_of_two, mp_policy=precision)
        for batch in batches_of(config):
            with Collectives() as noted:
                model(**on_device(mode, batch, device), num_sources=2).loss.backward()
            found.append((noted.called, {name for name, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
    assert found[0] == found[1] == found[2]
    called, trained = found[0]
    # every layer, embedding, head and what is left, forward and, where something trains behind it, backward
    assert called.count("c10d::_allgather_base_") > len(list(itertools.chain(*layer_stacks(model)))) + 3
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("c10d::_reduce_scatter_base_" in called) and called[-1] != "c10d::_allgather_base_"


def read_by_the_host(model, inputs):
    model.lm_head.register_forward_pre_hook(lambda module, args: args[0].sum().item())
    return inputs


def norm_read_by_the_host(model, inputs):
    """As a guard would that decides about the update by itself."""
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda weight: float(weight.grad.norm()))
    return inputs


def index_left_on_the_cpu(model, inputs):
    return inputs | {"feature_index": torch.zeros(inputs["feature_index"].shape, dtype=torch.int64)}


def made_on_the_cpu(model, inputs):
    model.lm_head.register_forward_pre_hook(lambda module, args: torch.zeros(3))
    return inputs


def wrong_dtype(model, inputs):
    return inputs | {"cu_seqlens": inputs["cu_seqlens"].long()}


@pytest.mark.parametrize(
    ("plant", "error"),
    [
        (read_by_the_host, DataDependentOutputException),
        (norm_read_by_the_host, DataDependentOutputException),
        (index_left_on_the_cpu, (FakeTensorDeviceMismatchError, AssertionError)),
        (made_on_the_cpu, AssertionError),
        (wrong_dtype, AssertionError),
    ],
)
def test_planted_fault_fails_the_rehearsal(plant, error):
    config = pairing_config(CLIP, LLAMA3)
    with FakeTensorMode() as mode:
        model = model_of(config, Rates(), "none")
        inputs = plant(model, on_device(mode, batches_of(config)[0]))
        with pytest.raises(error):
            rehearse(model, inputs, Rates())
