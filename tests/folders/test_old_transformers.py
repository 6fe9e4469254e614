"""Older transformers releases load the exports of every pairing and of each other kind of language model that they know
and compute the same, and adapters by the peft of their time.

Builds a virtual environment for each release (torch as installed here; about 1.2 GB and a minute or two
each) and keeps it in `~/.cache/llava-next-tests`, or in the folder that LLAVA_NEXT_TEST_CACHE names. To run it:

    LLAVA_NEXT_OLD_TRANSFORMERS=1 python -m pytest tests/folders/test_old_transformers.py

Known limit: 4.45 wants a CLS token from every vision tower, so a SigLIP model loads there and answers text, but its
code refuses any picture, whatever the files say.
"""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from llava_next.model.folders.adapters import save_adapter
from llava_next.model.folders.dry import architecture
from llava_next.model.folders.export import save_model
from llava_next.model.forward.kinds import LANGUAGE_KINDS
from llava_next.model.forward.lora import Lora, add_adapters
from llava_next.training.recipe.optim import Rates, freeze
from support.chats import CHATS, SYSTEM, messages_of
from support.exports import LLMS, PAIRINGS, compose_kind, compose_pairing, export_pairing
from support.kinds import KINDS, SIGLIP
from support.template_setups import FAMILIES, OWNS, SETUPS, setup
from support.tiny import geometry, pixel_batch, random_samples, tiny_pair

WANTED = os.environ.get("LLAVA_NEXT_OLD_TRANSFORMERS") == "1"
RELEASES = ("4.45.2", "4.49.0", "4.57.6")
PEFT = {"4.45.2": "0.13.2", "4.57.6": "0.18.0"}  # of the time
WORKER = Path(__file__).parents[1] / "support" / "workers" / "load_export.py"
CACHE = Path(os.environ.get("LLAVA_NEXT_TEST_CACHE", Path.home() / ".cache" / "llava-next-tests"))
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not WANTED, reason="builds an environment for each old transformers; set LLAVA_NEXT_OLD_TRANSFORMERS=1 to run"
    ),
]


def environment(release: str, peft: str | None = None) -> Path:
    """The Python of a virtual environment with that transformers and this one's torch, numpy and Pillow."""
    folder = CACHE / f"transformers-{release}-{f'peft-{peft}-' if peft else ''}torch-{version('torch').split('+')[0]}"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        same = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy", "pillow")]
        command = [folder / "bin" / "python", "-m", "pip", "install", "-q", f"transformers=={release}", *same]
        command += [f"peft=={peft}"] if peft else []
        done = subprocess.run([*command, "jinja2"], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "complete").touch()
    return folder / "bin" / "python"


def load_all(python: str | Path, exports: Path | list[Path], out: Path) -> Path:
    """Runs the worker on every export; returns its folder of results."""
    folders = sorted(map(str, exports.iterdir() if isinstance(exports, Path) else exports))
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), str(WORKER), str(out), *folders], env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """Every pairing exported in bf16, and in fp32 to compare logits closely."""
    root = tmp_path_factory.mktemp("pairings")
    for vision, llm in PAIRINGS:
        base = compose_pairing(root / "base" / f"{vision}-{llm}", vision, llm)
        for dtype in (torch.float32, torch.bfloat16):
            export_pairing(base, root / "exports" / f"{base.name}-{str(dtype).removeprefix('torch.')}", dtype)
    return root / "exports"


@pytest.fixture(scope="module")
def present(exports, tmp_path_factory) -> Path:
    return load_all(sys.executable, exports, tmp_path_factory.mktemp("present"))


@pytest.fixture(scope="module", params=RELEASES)
def old(request, exports, tmp_path_factory) -> Path:
    return load_all(environment(request.param), exports, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_old_release_loads_every_key_and_computes_the_same(old, present, pairing, dtype):
    name = f"{'-'.join(pairing)}-{dtype}"
    theirs, ours = (json.loads((folder / f"{name}.json").read_text()) for folder in (old, present))
    assert not any(theirs["loading"].values()), theirs["loading"]
    assert theirs["dtype"] == f"torch.{dtype}" and theirs["auto_class"] == "LlavaNextForConditionalGeneration"
    assert theirs["rope_theta"] == ours["rope_theta"] == LLMS[pairing[1]][4]
    for key in ("texts", "special", "generation_eos", "batch_ids", "roundtrip"):
        assert theirs[key] == ours[key], key
    sees = not (theirs["version"].startswith("4.45.") and pairing[0] == "siglip")
    assert len(ours["ids"]) == 5 and set(theirs["ids"]) == (set(ours["ids"]) if sees else {"text"})
    for case in theirs["ids"]:
        assert theirs["ids"][case] == ours["ids"][case], case  # the same number of image tokens among them
        assert theirs["greedy"][case] == ours["greedy"][case], case
        assert theirs["answers"][case] == ours["answers"][case], case
    their_tensors, our_tensors = (torch.load(folder / f"{name}.pt") for folder in (old, present))
    for case, value in their_tensors.items():
        if dtype == "float32" or case.startswith("pixels"):
            torch.testing.assert_close(value, our_tensors[case], rtol=TOLERANCE, atol=TOLERANCE)


def rendered(python: str | Path, cases: Path, out: Path) -> list[str]:
    """What the templates make of the chats in that Python."""
    command = [str(python), str(WORKER.with_name("render_chats.py")), str(cases), str(out)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("release", RELEASES)
def test_old_release_renders_every_chat_template_alike(release, tmp_path):
    """Named ones and language models' own with the image, string and list content, whole chats and prompts."""
    cases = []
    for name in (*SETUPS, *FAMILIES, *OWNS):
        if name in SETUPS and name not in ("vicuna", "mistral"):
            continue  # vocabularies that take long to read
        s = setup(name)
        tokens = {key: value for key, value in s.tokenizer.special_tokens_map.items() if isinstance(value, str)}
        for _, conversations in CHATS:
            if conversations[0] == SYSTEM and s.template.system_turn is None:
                continue
            for as_list in (False, True):
                messages = messages_of(conversations, as_list)
                for part in (part for message in messages if as_list for part in message["content"]):
                    part.pop("image", None)  # the picture itself, which no JSON holds
                cases += [(s.tokenizer.chat_template, tokens, messages[: len(messages) - p], bool(p)) for p in (0, 1)]
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    ours, theirs = (
        rendered(python, tmp_path / "cases.json", tmp_path / f"{number}.json")
        for number, python in enumerate((sys.executable, environment(release)))
    )
    assert len(ours) == len(cases) > 300 and ours == theirs


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory) -> dict[str, Path]:
    """Every other kind exported in fp32."""
    root = tmp_path_factory.mktemp("kinds")
    for name in KINDS:
        export_pairing(compose_kind(root / "base" / name, name), root / "exports" / name, torch.float32)
    return {name: root / "exports" / name for name in KINDS}


def knows(release: str, name: str) -> bool:
    """Whether a release computes a kind as the present one does."""
    since = LANGUAGE_KINDS[architecture(KINDS[name][0]).model_type].since
    return [int(part) for part in release.split(".")[:2]] >= [int(part) for part in since.split(".")]


@pytest.fixture(scope="module")
def kinds_at_present(of_kinds, tmp_path_factory) -> Path:
    return load_all(sys.executable, list(of_kinds.values()), tmp_path_factory.mktemp("present"))


@pytest.fixture(scope="module", params=RELEASES)
def old_kinds(request, of_kinds, tmp_path_factory) -> tuple[str, Path]:
    folders = [folder for name, folder in of_kinds.items() if knows(request.param, name)]
    return request.param, load_all(environment(request.param), folders, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", KINDS)
def test_old_release_computes_other_kinds_that_it_knows_alike(old_kinds, kinds_at_present, name):
    release, folder = old_kinds
    if not knows(release, name):
        pytest.skip(f"transformers {release} has no {name}")
    theirs, ours = (json.loads((at / f"{name}.json").read_text()) for at in (folder, kinds_at_present))
    assert not any(theirs["loading"].values()), theirs["loading"]
    assert theirs["rope_theta"] == ours["rope_theta"]
    sees = not (release.startswith("4.45.") and KINDS[name][1] == SIGLIP)
    assert len(ours["ids"]) == 5 and set(theirs["ids"]) == (set(ours["ids"]) if sees else {"text"})
    their_tensors, our_tensors = (torch.load(at / f"{name}.pt") for at in (folder, kinds_at_present))
    assert their_tensors
    for case, value in their_tensors.items():
        torch.testing.assert_close(
            value, our_tensors[case], rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, c=case: f"{c}: {m}"
        )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """LoRA in all of a tiny Llama + CLIP, and DoRA in the language model of it with the projector in full."""
    kinds = [Lora(r=4, alpha=8, targets=["llm", "vision", "projector"]), Lora(r=4, alpha=8, dora=True)]
    folders = []
    for lora in kinds:
        folder = tmp_path_factory.mktemp("adapters")
        model, _ = tiny_pair(folder / "start")
        add_adapters(model, lora, seed=0)
        freeze(model, Rates(vision=1e-3 if "vision" in lora.modules else None))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        save_adapter(model, folder / "adapter", lora, folder / "start", folder)
        save_model(model, folder / "model", dtype=torch.float32)
        example, sizes = random_samples(0, 1, images=(1,))[0]
        inputs = pixel_batch([example], [sizes], geometry(model.config), model.config)
        torch.save({name: value for name, value in inputs.items() if name != "labels"}, folder / "inputs.pt")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("release", PEFT)
def test_old_release_puts_every_tensor_of_an_adapter_in_its_place(adapters, release, tmp_path):
    python, worker = environment(release, PEFT[release]), WORKER.with_name("load_adapter.py")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [str(python), str(worker), str(tmp_path / "found.json"), *map(str, adapters)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found["lost"] == [] and found["base"] and found["placed"]
        assert found["differs"] < TOLERANCE < found["off"]
