"""What the training scripts put together, one function a line of their story."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llava_next.anyres import AnyRes
from llava_next.data.encode import Encoder, check_vocabulary
from llava_next.data.loader import Mixture
from llava_next.model.attention import attention_names, check_window, choose_attention
from llava_next.model.check import check_folder
from llava_next.model.modeling import LlavaNextForConditionalGeneration
from llava_next.templates import get_template
from llava_next.training.config import RunConfig
from llava_next.training.optim import build_optimizer, freeze, trainable_table, warmup_steps
from llava_next.training.parallel import shard

# of check_folder: those that compare with the training's templates
TEMPLATE_CHECKS = ("chat template", "chats", "terminator")


@dataclass
class Parts:
    """What a run needs beside weights: the model's config and how its samples are encoded."""

    model_config: object
    anyres: AnyRes
    encoder: Encoder
    fingerprint: str


def load_parts(config: RunConfig) -> Parts:
    """Reads config and tokenizer of the model folder.

    Raises:
        ValueError: not a LLaVA-NeXT folder, or one whose chat template is not the one to be trained.
    """
    folder = Path(config.model)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"model: {folder} has no config.json; make it with scripts/compose.py, or give stage 1's model/"
        )
    model_config = AutoConfig.from_pretrained(folder)
    if model_config.model_type != "llava_next":
        raise ValueError(
            f"model: {folder} is a {model_config.model_type!r} checkpoint; scripts/compose.py makes a LLaVA-NeXT of it"
        )
    check_window(model_config.text_config, config.data.max_length)
    template = get_template(config.data.template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # asked in one way and trained in another: the loss would not show it
    own_template = template.caption_only or tokenizer.chat_template == template.jinja
    if not own_template and not config.data.keep_template:
        raise ValueError(
            f"data.template: {template.name} is not the chat template saved in {folder}; compose the model with "
            f"--template {template.name}, train with the template it was composed for, or set data.keep_template: true "
            "to train in this one and keep the folder's own in the result"
        )
    template.check_tokenizer(tokenizer)
    check_vocabulary(tokenizer, model_config.text_config.vocab_size)
    vision = model_config.vision_config
    anyres = AnyRes(vision.image_size, vision.patch_size, [tuple(p) for p in model_config.image_grid_pinpoints])
    encoder = Encoder(template, tokenizer, model_config.image_token_id, anyres, config.data.max_length)
    return Parts(model_config, anyres, encoder, fingerprint(tokenizer, template.name))


def fingerprint(tokenizer: PreTrainedTokenizerBase, template_name: str) -> str:
    """Names a tokenizer with a template: text lengths counted under the same name are exact for the run."""
    text = f"{template_name}\n{tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_mixture(config: RunConfig, parts: Parts) -> Mixture:
    """The plan over the run's data sets; reads their indexes only."""
    data = config.data
    return Mixture(
        [(source.path, source.name, source.repeat) for source in data.sources],
        parts.anyres,
        batch_size=data.batch_size,
        epochs=data.epochs,
        seed=config.seed,
        max_length=data.max_length,
        fingerprint=parts.fingerprint,
        shuffle_shards=data.shuffle_shards,
    )


def empty_model(parts: Parts) -> LlavaNextForConditionalGeneration:
    """The model without memory: names, shapes and sizes only."""
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(parts.model_config)


def plan_banner(config: RunConfig, parts: Parts, mixture: Mixture, world: int) -> str:
    """What the run will do, to be read before it starts."""
    model = empty_model(parts)
    freeze(model, config.optim.rates)
    lines = [f"model      {config.model}: {parts.model_config.text_config.model_type} + "
             f"{parts.model_config.vision_config.model_type}, template {config.data.template}"]  # fmt: skip
    for module, trainable, total, rate in trainable_table(model, config.optim.rates):
        state = (
            f"{trainable:>14,} of {total:>14,} parameters at {rate:g}"
            if trainable
            else f"{'frozen':>14} {total:>17,} parameters"
        )
        lines.append(f"  {module:<9}{state}")
    for source, storage in zip(mixture.plan_sources, mixture.storages, strict=True):
        lines.append(
            f"data       {source.name}: {source.num_samples:,} samples x {source.repeat:g} from {storage.label}"
        )
    exact = "exact" if mixture.exact_lengths else "estimated from bytes"
    lines.append(f"  lengths  {exact}; {mixture.num_too_long:,} samples longer than {config.data.max_length:,} tokens")
    total, warmup = mixture.total_steps, warmup_steps(mixture.total_steps, config.optim.warmup_ratio)
    lines.append(
        f"steps      {total:,} of {config.data.batch_size} samples, {warmup:,} warm-up, cosine to 0; "
        f"seed {config.seed}, weighting {config.optim.loss_weighting}, clip {config.optim.max_grad_norm}"
    )
    lines.append(dealing_line(config, mixture, world))
    lines.append(f"run        {config.run_dir}")
    return "\n".join(lines)


def dealing_line(config: RunConfig, mixture: Mixture, world: int) -> str:
    """How well the first steps divide among the ranks: mean cost over slowest, tokens of the budget in use."""
    micros, tokens, sizes = [], [], []
    for step in range(min(20, mixture.total_steps)):
        ids = mixture.step_ids(step)
        bins = mixture.deal(step, world, config.data.token_budget, config.data.tile_budget)
        micros.append(len(bins))
        sizes += [len(b) for by_rank in bins for b in by_rank]
        tokens += [mixture.lengths[ids[b]].sum() for by_rank in bins for b in by_rank]
    balance = np.mean(tokens) / np.mean(np.array(tokens).reshape(-1, world).max(axis=1))
    return (
        f"dealing    {np.mean(micros):.1f} micro-batches a step on {world} rank(s), {np.mean(tokens):,.0f} tokens each "
        f"(budget {config.data.token_budget:,}), {np.mean(sizes):.1f} samples, tokens balanced to {100 * balance:.1f} %"
    )


def build_model(config: RunConfig, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Loads the weights, freezes what has no rate, shards, and makes the optimizer over the shards."""
    transformers_logging.disable_progress_bar()
    full_precision = accelerator.mixed_precision == "no"
    kernel, reason = choose_attention(
        config.attn_implementation, accelerator.device, torch.float32 if full_precision else torch.bfloat16
    )
    accelerator.print(f"attention  {kernel}: {reason}", flush=True)
    model = LlavaNextForConditionalGeneration.from_pretrained(
        config.model,
        dtype=torch.float32 if full_precision else "auto",
        attn_implementation=attention_names(kernel),
    )
    optim = config.optim
    freeze(model, optim.rates)
    return shard(
        accelerator,
        model,
        lambda m: build_optimizer(m, optim.rates, tuple(optim.betas), optim.eps, optim.weight_decay),
    )


def report_export(folder: Path, keep_template: bool = False) -> None:
    """Checks a model folder just written and prints what was found.

    Args:
        keep_template: the folder has a chat template of its own: what differs from the training's is printed only.

    Raises:
        RuntimeError: the folder would not load or answer as trained.
    """
    findings = check_folder(folder)
    for finding in findings:
        if not finding.ok:
            print(finding, flush=True)
    excused = TEMPLATE_CHECKS if keep_template else ()
    failed = [finding for finding in findings if not finding.ok and finding.check not in excused]
    if failed:
        raise RuntimeError(f"{folder} was written but fails {len(failed)} of {len(findings)} checks, see above")
    print(f"model written to {folder}; {len(findings)} checks made", flush=True)
