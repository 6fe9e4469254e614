"""What the training scripts put together, one function a line of their story."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llava_next.anyres import AnyRes
from llava_next.data.inputs.samples import SampleMaker, model_template
from llava_next.data.inputs.unbuilt import Unbuilt, measure, records_file
from llava_next.data.loading.encode import Encoder, check_vocabulary
from llava_next.data.loading.feed import Feed
from llava_next.data.loading.loader import LoaderOptions, build_loader
from llava_next.data.plan.mixture import Mixture
from llava_next.data.plan.profile import PREFIX, Profile
from llava_next.data.storage.cache import Cache
from llava_next.data.storage.client import Storage
from llava_next.model.folders.adapters import adapter_base, check_start, load_adapter
from llava_next.model.folders.check_adapter import check_any
from llava_next.model.forward.attention import attention_names, choose_attention
from llava_next.model.forward.fused import choose_fused, fuse_layers
from llava_next.model.forward.kinds import check_language_model, check_tower
from llava_next.model.forward.lora import Lora, adapter_layers, add_adapters, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.model.forward.nf4 import check_kernels
from llava_next.own_template import template_for
from llava_next.templates import Template
from llava_next.tokenise import fingerprint
from llava_next.training.devices.float8 import check_device, use_float8
from llava_next.training.devices.hardware import peak_flops
from llava_next.training.devices.launch import checkpointing_policy
from llava_next.training.devices.parallel import shard, use_deterministic
from llava_next.training.forecast.flops import cost_model, flops_model
from llava_next.training.recipe.config import RunConfig
from llava_next.training.recipe.optim import build_optimizer, freeze
from llava_next.training.watch.journal import Journal
from llava_next.training.watch.metrics import Progress

# of check_any: those that compare with the training's templates
TEMPLATE_CHECKS = ("chat template", "chats", "terminator")


@dataclass
class Parts:
    """What a run needs beside weights: the model's config and how its samples are encoded.

    Args:
        stands_in: what was taken for a model folder that is not there; empty when it is.
        lora: adapters that the model gets; quantize: how the language model's matrices under them are kept.
        made: of the files beside the result's weights, what cannot be copied from the start model, by name of the
            check that it failed (see `readiness.check_ready`).
    """

    model_config: object
    anyres: AnyRes
    encoder: Encoder
    fingerprint: str
    stands_in: str = ""
    lora: Lora | None = None
    quantize: str | None = None
    made: list[str] = field(default_factory=list)


def read_model_config(model: str):
    """The configuration of a LLaVA-NeXT model folder. Raises ValueError: it is not one."""
    folder = Path(model)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"model: {folder} has no config.json; make it with scripts/compose.py, or give stage 1's model/ "
            "(--dry_run plans with an architecture's name alone)"
        )
    model_config = AutoConfig.from_pretrained(folder)
    if model_config.model_type != "llava_next":
        raise ValueError(
            f"model: {folder} is a {model_config.model_type!r} checkpoint; scripts/compose.py makes a LLaVA-NeXT of it"
        )
    return model_config


def load_parts(config: RunConfig) -> Parts:
    """Reads config and tokenizer of the model folder.

    Raises:
        ValueError: not a LLaVA-NeXT folder, or one whose chat template is not the one to be trained.
    """
    folder = Path(config.model)
    model_config = read_model_config(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = template_for(config.data.template, tokenizer)
    # asked in one way and trained in another: the loss would not show it
    own_template = template.caption_only or tokenizer.chat_template == template.jinja
    if not own_template and not config.data.keep_template:
        raise ValueError(
            f"data.template: {template.name} is not the chat template saved in {folder}; compose the model with "
            f"--template {template.name}, train with the template it was composed for, or set data.keep_template: true "
            "to train in this one and keep the folder's own in the result"
        )
    parts = parts_of(config, model_config, tokenizer, template)
    if config.lora and config.lora.start:
        check_start(config.lora, folder, list(adapter_layers(empty_model(parts))))
    return parts


def parts_of(config: RunConfig, model_config, tokenizer, template: Template) -> Parts:
    """What encodes the samples of a model in the run's template. Raises ValueError: they do not go together."""
    check_language_model(model_config.text_config, f"model: {config.model}")
    check_tower(model_config.vision_config, f"model: {config.model}")
    template.check_tokenizer(tokenizer)
    check_vocabulary(tokenizer, model_config.text_config.vocab_size)
    vision = model_config.vision_config
    square = config.data.images == "square"
    pinpoints = [] if square else [tuple(p) for p in model_config.image_grid_pinpoints]
    anyres = AnyRes(vision.image_size, vision.patch_size, pinpoints, square)
    encoder = Encoder(template, tokenizer, model_config.image_token_id, anyres, config.data.max_length)
    parts = Parts(model_config, anyres, encoder, fingerprint(tokenizer, template.identity))
    parts.lora, parts.quantize = config.lora, config.quantize
    if config.lora:
        empty_model(parts, torch.float32)  # raises where a target finds no place
    return parts


def image_root(config: RunConfig, file: Path) -> Path:
    """Where the images of a file of records lie. Raises ValueError."""
    root = Path(config.data.image_root) if config.data.image_root else file.parent
    if config.data.image_root and not root.is_dir():
        raise ValueError(f"data.image_root: {root} is not a folder")
    return root


def build_command(config: RunConfig, file: Path) -> str:
    """What makes the data set of a file of records that the run is planned with."""
    words = ["--json", file, "--images", image_root(config, file), "--model", config.model]
    words += ["--tokenizer", f"{config.model}:{config.data.template}"]
    words += ["--square"] if config.data.images == "square" else []
    return shlex.join(["python", "data_tools/build_shards.py", *map(str, words), "--out", f"shards/{file.stem}"])


def check_built(config: RunConfig) -> None:
    """Refuses files of records where shards are needed, with the command that builds them. Raises ValueError."""
    for key in ("sources", "validation"):
        for source in getattr(config.data, key):
            if (file := records_file(source.path)) is not None:
                raise ValueError(
                    f"data.{key}: {file} is no folder of shards; from a file of records a run is only planned "
                    f"(--dry_run). Build it, and give the folder that --out names:\n    {build_command(config, file)}"
                )


def open_source(config: RunConfig, parts: Parts, path: str, cache: Cache | None) -> Storage | Unbuilt | Profile:
    """A data set, what would be built of a file of records, or the profile that stands in. Raises ValueError."""
    if path.startswith(PREFIX):
        return Profile(path, parts.anyres)
    if (file := records_file(path)) is None:
        return Storage(path, cache=cache)
    maker = SampleMaker(image_root(config, file), parts.anyres, template=model_template(Path(config.model)))
    # an architecture has no tokenizer: lengths are estimated then
    tokenizers = () if parts.stands_in else (f"{config.model}:{config.data.template}",)
    return measure(file, maker, tokenizers)


def open_mixture(config: RunConfig, parts: Parts) -> Mixture:
    """The plan over the run's data sets; reads their indexes, and of files of records the headers of pictures."""
    data = config.data
    cache = Cache(data.cache_dir, int(data.cache_gb * 1e9)) if data.cache_dir else None
    return Mixture(
        [(open_source(config, parts, source.path, cache), source.name, source.repeat) for source in data.sources],
        parts.anyres,
        batch_size=data.batch_size,
        epochs=data.epochs,
        seed=config.seed,
        max_length=data.max_length,
        fingerprint=parts.fingerprint,
        shuffle_shards=data.shuffle_shards,
        cost=cost_model(parts.model_config, config.rates),  # a plan may know better, see `planning.make_plan`
    )


def cut_warning(mixture: Mixture) -> str | None:
    """How many samples lose all their answers by the length, and the length to take; None when none do."""
    if not mixture.num_all_cut:
        return None
    cut, total = mixture.num_all_cut, mixture.samples_per_epoch
    return (
        f"{'' if mixture.exact_cut else 'at least '}{cut:,} of {total:,} samples ({cut / total:.2%}) teach nothing: "
        f"data.max_length {mixture.max_length:,} cuts all their answers; {mixture.length_for_most:,} tokens keep 99 % "
        "of each source's samples whole, and of those with pictures"
    )


def check_cut(config: RunConfig, mixture: Mixture, key: str = "data.sources") -> None:
    """Refuses a length at which too many samples, of the data sets under `key`, lose all their answers. ValueError."""
    data = config.data
    if mixture.num_all_cut > data.max_skip_share * mixture.samples_per_epoch and not data.allow_cut:
        raise ValueError(
            f"{key}: {cut_warning(mixture)}. That is more than data.max_skip_share {data.max_skip_share}; "
            "--data.allow_cut true goes on as it is"
        )


def refused_systems(parts: Parts, mixture: Mixture) -> int:
    """Samples with a system prompt of their own that the template has no place for, as far as builds counted them."""
    if parts.encoder.template.system_turn is not None:
        return 0
    return sum(info.build.get("system_prompts", 0) for info in mixture.infos)


def check_systems(config: RunConfig, parts: Parts, mixture: Mixture) -> None:
    """Refuses data of which the template cannot take too many samples. Raises ValueError."""
    data, total = config.data, sum(info.samples for info in mixture.infos)
    refused = refused_systems(parts, mixture)
    if refused > data.max_skip_share * total:
        raise ValueError(
            f"data.template: {data.template} has no place for a system prompt, and {refused:,} of {total:,} samples "
            f"have one of their own, more than data.max_skip_share {data.max_skip_share}: build the data with "
            "--system drop or --system prepend, or train in another template"
        )


def open_feed(config: RunConfig, parts: Parts, mixture: Mixture, rank: int, world: int, start_step: int) -> Feed:
    """Starts loading this rank's micro-batches, from a step on."""
    data, run_dir = config.data, Path(config.run_dir)
    options = LoaderOptions(data.num_workers, data.reads_in_flight, data.stall_seconds, run_dir)
    loader = build_loader(mixture, parts.encoder, rank, world, data.token_budget, data.tile_budget, start_step, options)
    return Feed(loader, data.stall_seconds, options.dump_file(f"rank{rank}"))


def empty_model(parts: Parts, quantised: torch.dtype | None = None) -> LlavaNextForConditionalGeneration:
    """The model without memory: names, shapes and sizes only.

    Args:
        quantised: dtype that the run computes in, where matrices in 4 bits are to be what they are then; else whole.
    """
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(parts.model_config)
    if parts.quantize and quantised:
        quantise_under(model, parts.lora, quantised)
    if parts.lora:
        add_adapters(model, parts.lora, seed=0)
    return model


def build_model(config: RunConfig, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Loads the weights, freezes what has no rate, shards, and makes the optimizer over the shards."""
    transformers_logging.disable_progress_bar()
    if config.deterministic:
        use_deterministic()
    full_precision = accelerator.mixed_precision == "no"
    computing = torch.float32 if full_precision else torch.bfloat16
    kernel, reason = choose_attention(config.attn_implementation, accelerator.device, computing)
    accelerator.print(f"attention  {kernel}: {reason}", flush=True)
    if config.float8:
        check_device(accelerator.device)
    kernels, fused = choose_fused(config.fused_layers, accelerator.device, config.fused_elsewhere)
    if config.quantize:
        check_kernels(accelerator.device, computing)
    if config.compiled and accelerator.state.fsdp_plugin.activation_checkpointing_offload:
        raise ValueError(
            "compile_layers: no layer would be compiled under the launch file's fsdp_activation_checkpointing_offload: "
            "true; set one of them to false"
        )
    model = LlavaNextForConditionalGeneration.from_pretrained(
        config.model,
        dtype=torch.float32 if full_precision and not config.quantize else "auto",
        attn_implementation=attention_names(kernel),
    )
    optim = config.optim
    if config.quantize:  # from the files' own mapped memory, before anything of it is copied
        quantise_under(model, config.lora, computing, accelerator.device)
        model = model.float() if full_precision else model
    if config.lora:
        add_adapters(model, config.lora, config.seed)
        if config.lora.start:
            load_adapter(model, Path(config.lora.start))
    freeze(model, optim.rates)
    left = fuse_layers(model.model.language_model, kernels) if kernels else {}
    if accelerator.device.type == "cuda":
        kept = ", ".join(f"{count} {name}" for name, count in left.items())
        accelerator.print(f"fused      {fused}{f'; as they are: {kept}' if kept else ''}", flush=True)
    if config.float8:
        converted = use_float8(model)
        accelerator.print(f"float8     {converted} linear layers of the language model", flush=True)
    return shard(
        accelerator,
        model,
        lambda m: build_optimizer(
            m, optim.rates, tuple(optim.betas), optim.eps, optim.weight_decay, optim.name, config.seed
        ),
        config.activation_checkpointing,
        config.compiled,
        optim.master,
    )


def open_journal(
    config: RunConfig, accelerator: Accelerator, parts: Parts, mixture: Mixture, start_step: int
) -> Journal:
    """What the run reports to; MFU is known for devices whose peak is."""
    progress = Progress(config.last_step(mixture.total_steps), start_step)
    policy = checkpointing_policy(config.activation_checkpointing)
    flops = flops_model(parts.model_config, config.rates, policy)
    on_cuda = accelerator.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device)) if on_cuda else None
    return Journal(config, accelerator, mixture, progress, flops, peak)


def excused_checks(keep_template: bool) -> tuple[str, ...]:
    """Names of the checks that a folder with a chat template of its own need not pass."""
    return TEMPLATE_CHECKS if keep_template else ()


def report_export(folder: Path, keep_template: bool = False) -> None:
    """Checks a model or adapter folder just written and prints what was found.

    Args:
        keep_template: the folder has a chat template of its own: what differs from the training's is printed only.

    Raises:
        ValueError: the folder would not load or answer as trained.
    """
    findings = check_any(folder)
    for finding in findings:
        if not finding.ok:
            print(finding, flush=True)
    excused = excused_checks(keep_template)
    failed = [finding for finding in findings if not finding.ok and finding.check not in excused]
    if failed:
        raise ValueError(
            f"{folder} was written but fails {len(failed)} of {len(findings)} checks, see above: mend the files that "
            "they name, then see scripts/check_export.py"
        )
    base = adapter_base(folder)
    said = f"adapter written to {folder}, for its base {base}" if base else f"model written to {folder}"
    print(f"{said}; {len(findings)} checks made", flush=True)
