"""Liger's kernels in the layers: what is replaced, that results stay, and that nothing is said to run that does not.

The kernels need a GPU. Here stand-ins with their signatures and arithmetic compute in their place; with
LLAVA_NEXT_LIGER=FOLDER, where liger-kernel and triton lie, they themselves do, by triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch
from transformers import GemmaConfig, GemmaModel, Qwen3Config, Qwen3Model

from llava_next.model.folders.dry import LLMS
from llava_next.model.forward.fused import FUNCTIONS, choose_fused, fuse_layers, load_kernels
from llava_next.training.devices.parallel import apply_checkpointing
from llava_next.training.recipe.checks import check_run
from llava_next.training.recipe.config import RunConfig, Source
from llava_next.versions import install
from support.kernels import models_of, step
from support.launching import ROOT
from support.published import LLAMA3, VICUNA

SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32, "head_dim": 12}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("llm", "policy"),
    [(llm, policy) for llm, policy in zip(LLMS, ("none", "full", "selective", 1), strict=False)]
    + [(VICUNA, "selective")],
    ids=lambda value: str(value).split("/")[-1],
)
def test_loss_and_gradients_stay_and_each_operation_is_one_call(liger, llm, policy):
    """Loss to 1e-6, gradients to 1e-5; the rotation is in place, and what selective checkpointing keeps stays."""
    ours, plain = models_of(llm)
    names = [name for name, _ in ours.named_parameters()]
    assert fuse_layers(ours.model.language_model, load_kernels()) == {}
    assert [name for name, _ in ours.named_parameters()] == names
    for model in (ours, plain):
        apply_checkpointing(model, policy)
    (loss, found), (expected, wanted) = step(ours), step(plain)
    assert loss == pytest.approx(expected, rel=1e-6) and list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    layers = ours.config.text_config.num_hidden_layers
    again = 1 + (policy != "none")
    calls = {name: liger.count(function) for name, function in FUNCTIONS.items()}
    # recomputation ends with the last value that backward asks for: the product before it is among them
    assert calls == {"norm": 2 * layers * again + 1, "swiglu": layers * again, "rope": layers * again}


def test_norms_of_queries_and_keys_are_known_too(liger):
    """Qwen3: on top of two norms a layer and the last, one for queries and one for keys."""
    torch.manual_seed(0)
    model = Qwen3Model(Qwen3Config(**SMALL)).eval()
    with torch.no_grad():
        plain = model(torch.arange(9)[None]).last_hidden_state
        assert fuse_layers(model, load_kernels()) == {}
        fused = model(torch.arange(9)[None]).last_hidden_state
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert liger.count("LigerRMSNormFunction") == 2 * 4 + 1


def test_layers_of_other_classes_stay_and_are_named(liger):
    """Gemma's norms count from 1 and its MLP has another activation; a subclass may compute anything."""
    model = GemmaModel(GemmaConfig(**SMALL))
    before = [type(module) for module in model.modules()]
    left = {"GemmaRMSNorm": 5, "GemmaMLP": 2, "GemmaAttention": 2}
    assert fuse_layers(model, load_kernels()) == left and [type(module) for module in model.modules()] == before
    decoder = models_of(LLAMA3)[0].model.language_model
    decoder.norm.__class__ = type("LlamaRMSNorm", (type(decoder.norm),), {})
    decoder.layers[0].mlp.act_fn = torch.nn.GELU()
    assert fuse_layers(decoder, load_kernels()) == {"LlamaRMSNorm": 1, "LlamaMLP": 1}


def test_choice_names_its_reason(monkeypatch, liger):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    reasons = {
        (False, cuda, None): "off, as asked for",
        ("auto", cpu, None): "no kernels of Liger's: they are for CUDA, the device is cpu",
        ("auto", cuda, "float8"): "no kernels of Liger's: float8 has its own",
    }
    monkeypatch.setattr("llava_next.model.forward.fused.find_spec", lambda name: None)
    reasons["auto", cuda, None] = f"no kernels of Liger's: liger-kernel is not installed; `{install('fused')}`"
    for arguments, reason in reasons.items():
        assert choose_fused(*arguments) == ({}, reason)
    for device, reason in ((cpu, "the device is cpu"), (cuda, "liger-kernel is not installed; `pip")):
        with pytest.raises(ValueError, match=f"fused_layers: Liger's kernels cannot be used: .*{reason}"):
            choose_fused(True, device)
    monkeypatch.setattr("llava_next.model.forward.fused.find_spec", lambda name: object())
    kernels, reason = choose_fused("auto", cuda)
    assert list(kernels) == list(FUNCTIONS) and reason == "norm, SwiGLU and rotary embedding by Liger's kernels"
    monkeypatch.delattr(sys.modules["liger_kernel.ops"], "LigerRopeFunction")
    assert "liger-kernel does not load (module 'liger_kernel.ops' has no" in choose_fused("auto", cuda)[1]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)  # as without triton
    assert choose_fused("auto", cuda)[0] == {}


def test_configuration_refuses_kernels_beside_those_of_the_compiler():
    run = RunConfig(model="m", run_dir="r", fused_layers=True)
    run.data.sources = [Source("s")]
    check_run(run)
    run.compile_layers = True
    with pytest.raises(ValueError, match="fused_layers: its kernels do not pay beside compile_layers"):
        check_run(run)
    run.fused_layers = "auto"
    check_run(run)


@pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_LIGER"), reason="asks for liger-kernel and triton")
def test_the_kernels_themselves_compute_what_stock_layers_compute():
    """Forward and gradients in float32 to 1e-5, by triton's interpreter."""
    worker = ROOT / "tests/support/workers/liger.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, worker], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2 models the same"
