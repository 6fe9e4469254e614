"""The configuration of a run: typed dataclasses filled from YAML and the command line.

An unknown key is an error, every value is checked before anything is loaded, and the resolved configuration is saved
in the run folder.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from llava_next.model.forward.lora import Lora
from llava_next.paths import local_path
from llava_next.training.devices.hardware import Hardware, parse_hardware
from llava_next.training.recipe.checks import check_run, in_short
from llava_next.training.recipe.evaluate import EvaluateConfig
from llava_next.training.recipe.optim import AdaptedRates, Rates


@dataclass
class Source:
    """A data set of the mixture.

    Args:
        path: folder with dataset.json, local or a URL; in a dry run also a file of records.
        name: shown in logs; default: the folder's name.
        repeat: how often each sample is seen in an epoch; 0.5 takes a random half.
    """

    path: str
    name: str | None = None
    repeat: float = 1.0


@dataclass
class DataConfig:
    """What is trained on and how it is dealt to the ranks.

    Args:
        sources: data sets of the mixture: a path, or a list of paths and `Source`s. A dry run also takes files of
            records (JSON, JSONL, YAML mixtures) that are not built yet, and `profile:mix665k` or
            `profile:pretrain558k`, whose assumed sizes stand in for data; the default there.
        image_root: folder that image paths of such files are relative to; null: the file's own.
        template: chat template of the training text, `own` for the language model's own; `plain` in stage 1.
        keep_template: allow a model folder whose saved chat template is not this one (a published llava-hf folder's
            own); the result keeps the folder's, so it is asked in another form than it was trained in.
        images: `anyres`, or `square` for a stage 1 as LLaVA-1.5's: one tile from a picture's middle, no newline. The
            shards must have been built for it (build_shards.py --square).
        batch_size: samples of an optimizer step, over all ranks.
        epochs: passes over the mixture.
        max_length: tokens of a sample, image tokens included; longer ones are cut at the end.
        token_budget: tokens of a micro-batch on one rank; `auto`: what takes the least time and fits. Changes speed
            and memory, never the result.
        tile_budget: tiles of a micro-batch on one rank, or `auto`.
        shuffle_shards: shards per shuffle window; null shuffles the whole data set.
        allow_changed_plan: resume although sources, seed or batch size changed, with the samples not yet seen.
        num_workers: loader processes per rank; 0 loads in the training process.
        reads_in_flight: reads of one rank that wait for the network at a time.
        cache_dir: local folder that keeps what was read from the network; the ranks of a node share it.
        cache_gb: size of that folder at most, in GB; what was used longest ago goes first.
        stall_seconds: without data for so long, a dump of what is in flight is written to the run folder.
        max_skip_share: share of undecodable samples above which the run stops, and of samples that max_length leaves
            without any answer above which it does not start; held-out data too.
        allow_cut: start although more samples than that lose their answers.
        validation: held-out data sets, given like sources.
        validation_every: steps between held-out losses, besides the one at the end; 0 measures at the end only.
        validation_steps: batches of the held-out data that are looked at; null takes all.
    """

    sources: str | list[str | Source] = field(default_factory=list)
    image_root: str | None = None
    template: str = "vicuna_v1"
    keep_template: bool = False
    images: Literal["anyres", "square"] = "anyres"
    batch_size: int = 128
    epochs: int = 1
    max_length: int = 4096
    token_budget: Literal["auto"] | int = "auto"
    tile_budget: Literal["auto"] | int = "auto"
    shuffle_shards: int | None = None
    allow_changed_plan: bool = False
    num_workers: int = 4
    reads_in_flight: int = 64
    cache_dir: str | None = None
    cache_gb: float = 100.0
    stall_seconds: float = 120.0
    max_skip_share: float = 0.001
    allow_cut: bool = False
    validation: str | list[str | Source] = field(default_factory=list)
    validation_every: int = 0
    validation_steps: int | None = None


@dataclass
class OptimConfig:
    """Optimizer, schedule and loss. Defaults: the published recipe.

    Args:
        rates: peak learning rate per module.
        name: `adamw`; `adamw8bit` keeps its moments in 8 bits with a scale for every 256, by torchao: 2 bytes a trained
            parameter, not 8 (extra `adamw8bit`).
        master: what trained parameters are kept in: `fp32`, or `bf16`, rounded at random so that small updates count: 2
            bytes a parameter, not 4. Needs mixed_precision bf16 in the launch file; gradients stay fp32.
        betas, eps, weight_decay: of AdamW.
        warmup_ratio: share of the steps with linear warm-up.
        max_grad_norm: clipping; null switches it off (the original DeepSpeed runs had none).
        loss_weighting: `token`: every supervised token of a step counts the same; `sample`: every sample;
            `micro_batch_mean`: token mean in groups of 8 samples in plan order, mean over groups, as the original.
        max_skipped_steps: an update whose loss or gradient is not finite is skipped; so many in a row end the run.
    """

    rates: Rates = field(default_factory=Rates)
    name: Literal["adamw", "adamw8bit"] = "adamw"
    master: Literal["fp32", "bf16"] = "fp32"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 1.0
    loss_weighting: Literal["token", "sample", "micro_batch_mean"] = "token"
    max_skipped_steps: int = 10


@dataclass
class CheckpointConfig:
    """Checkpoints in the run folder.

    Args:
        every: steps between checkpoints; 0 writes none but the last.
        keep_last: how many of the newest are kept.
        keep_every: those of every so many steps are kept for good; 0: none.
        asynchronous: write in the background while training goes on. Takes host memory for a copy of what is saved;
            with false training waits for the disk.
        dir: where they go; default: `checkpoints` in the run folder. Machines of a run must share it. With a URL (s3,
            gs, az) they go there as well, each when it is complete in the run folder. One run at a time writes to it.
        export_every: steps between exports of the model to `model-step-N/`; 0 exports at the end only.
        resume: `auto` continues from the newest whole one, `never` starts anew (and refuses a run folder that has
            checkpoints), a path continues from that one.
    """

    every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    dir: str | None = None
    export_every: int = 0
    resume: str = "auto"


@dataclass
class ProfileConfig:
    """What to look into. The result goes to `profile/` in the run folder, see `profile.StepProfiler`.

    Args:
        steps: steps that are traced, counted from 1 as in the log: [10, 12] traces these two. Take some after the
            first, which is not like the others.
    """

    steps: list[int] = field(default_factory=list)


@dataclass
class RunConfig:
    """A training run.

    Args:
        model: folder of the model to start from (see scripts/compose.py), or of stage 1's result. A dry run also takes
            an architecture (see `stand_ins.plan_parts`), as recipes name theirs.
        run_dir: where config, metrics, checkpoints and the resulting `model/` go.
        data, optim, checkpoint, evaluate, profile: see there.
        lora: train low-rank adapters; null: in full.
        quantize: `nf4` keeps the language model's matrices that have adapters in 4 bits while they train (QLoRA); extra
            `qlora`. Results are merged into the matrices as they were.
        attn_implementation: segment attention's kernel: FlashAttention 3 (Hopper, package flash_attn_3), torch's varlen
            (CUDA), flash-attn, one SDPA call a segment, or the best that runs here.
        activation_checkpointing: what `fsdp_activation_checkpointing: true` of the launch file means: a layer keeps
            everything for backward (`none`), the outputs of its matrix products and attention (`selective`: less
            memory, next to nothing computed twice), or its input (`full`); a number: so many of the language model's
            layers their input, the others `selective`; `auto`: what takes the least time and fits. With `false` there
            every layer keeps everything.
        compile_layers: torch.compile for each layer of tower and language model, for sequences of any length. The first
            steps wait for it; `auto`: not until a GPU's figures say that it pays. Names in checkpoints and results are
            the same, so a run may go on with or without it.
        float8: matrix products of the language model's layers in float8, rounded by one scale a tensor; extra `float8`,
            GPUs from Ada and Hopper on, meant to go with compile_layers. MFU in the log stays a share of the bf16 peak.
        fused_layers: norms, SwiGLU and rotary embedding of the language model by Liger's kernels (extra `fused`);
            `auto`: on CUDA where they are installed, but not beside compile_layers and float8.
        deterministic: on GPUs too the same run gives the same bits, as on CPUs always, and goes on bit by bit from a
            checkpoint; some sums and attention's backward take longer for it.
        seed: of the data order.
        max_steps: stop after this many steps although the schedule goes on; null runs to the end.
        log_every: steps between console lines.
        log_with: trackers besides metrics.jsonl: wandb (offline with WANDB_MODE=offline), tensorboard.
        log_required: end the run before it begins when one of them cannot be reached; otherwise it goes on without.
        hang_seconds: a rank that finishes no step for so long writes the stacks of all its threads to the run folder.
        push_to_hub: `ORG/NAME` of a hub repository that gets `model/` and its card at the end; the token comes from the
            environment. A failed upload changes nothing of the run.
        push_public: make that repository, where it is new, public; else it is private.
    """

    model: str = ""
    run_dir: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    lora: Lora | None = None
    quantize: Literal["nf4"] | None = None
    attn_implementation: Literal["auto", "fa3", "varlen", "flash", "sdpa"] = "auto"
    activation_checkpointing: Literal["auto", "none", "selective", "full"] | int = "auto"
    compile_layers: Literal["auto"] | bool = "auto"
    float8: bool = False
    fused_layers: Literal["auto"] | bool = "auto"
    deterministic: bool = False
    seed: int = 42
    max_steps: int | None = None
    log_every: int = 10
    log_with: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    log_required: bool = False
    hang_seconds: float = 600.0
    push_to_hub: str | None = None
    push_public: bool = False

    @property
    def rates(self) -> AdaptedRates:
        """What is trained, and how."""
        return AdaptedRates(**vars(self.optim.rates), lora=self.lora, quantize=self.quantize)

    def last_step(self, total: int) -> int:
        """The step that the run ends with, of a schedule of so many."""
        return min(total, self.max_steps or total)

    @property
    def compiled(self) -> bool:
        """What `compile_layers` means."""
        return self.compile_layers is True

    @property
    def fused_elsewhere(self) -> str | None:
        """The option beside which Liger's kernels do not pay."""
        return "compile_layers" if self.compiled else "float8" if self.float8 else None


@dataclass(frozen=True)
class Options:
    """What the command line asks for besides the run itself.

    Args:
        dry_run: print the plan and stop.
        as_if: the machine that the plan is made for; None: the one at hand.
        take_over: take the run folder from another run that holds it, which ends.
        command: the script with what it was given, but for these.
    """

    dry_run: bool = False
    as_if: Hardware | None = None
    take_over: bool = False
    command: tuple[str, ...] = ()


def run_parser(default_recipe: Path | None = None, with_recipe: bool = True) -> ArgumentParser:
    """Command line of the training scripts: `--config FILE` and every key of `RunConfig` as `--a.b value`.

    Args:
        default_recipe: `recipes/MODEL/STAGE.yaml`, read when the command line names no `--config`. What all models
            share in that stage, `recipes/STAGE.yaml`, is read before any recipe, also before a user's own.
    """
    parser = ArgumentParser(
        description="Trains a LLaVA-NeXT model.",
        exit_on_error=False,  # one message a run, not one a rank
        usage="%(prog)s [--config RECIPE.yaml] [--KEY VALUE ...]   (--help lists the keys)",
    )
    parser.add_argument("--config", action="config", help="YAML recipe; later options override it")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop; needs no GPU and no weights")
    parser.add_argument("--as_if", help="with --dry_run: plan for this machine, as 8xh100-80g", metavar="MACHINE")
    parser.add_argument("--take_over", action="store_true", help="end another run that holds the run folder")
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    if default_recipe is not None:
        shared = default_recipe.parents[1] / default_recipe.name
        parser.default_config_files = [str(shared), *([str(default_recipe)] if with_recipe else [])]
    return parser


def parse_run(args: list[str] | None = None, default_recipe: Path | None = None) -> tuple[RunConfig, Options]:
    """The run's configuration, and what else was asked for.

    Raises:
        ValueError: an unknown key, a wrong type or a value that cannot work, naming the key.
    """
    args = sys.argv[1:] if args is None else args
    if {"-h", "--help"} & set(args) and os.environ.get("RANK", "0") != "0":
        sys.exit(0)  # rank 0 shows it
    names_a_recipe = any(a == "--config" or a.startswith("--config=") for a in args)
    parser = run_parser(default_recipe, with_recipe=not names_a_recipe)
    try:
        values = parser.instantiate(parser.parse_args(args)).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{in_short(str(error))}\n(--help lists the keys)") from None
    values.pop("config", None)
    dry_run, as_if, take_over = (values.pop(name) for name in ("dry_run", "as_if", "take_over"))
    if as_if and not dry_run:
        raise ValueError(f"--as_if {as_if}: plans for another machine; add --dry_run")
    script = f"scripts/{default_recipe.stem if default_recipe else 'finetune'}.py"
    command = (script, *_without_options(args))
    options = Options(dry_run, parse_hardware(as_if) if as_if else None, take_over, command)
    config = RunConfig(**values)
    _resolve_paths(config)
    config.data.sources = _sources(config.data.sources)
    config.data.validation = _sources(config.data.validation)
    if dry_run and not config.data.sources:
        config.data.sources = [Source("profile:pretrain558k" if config.data.template == "plain" else "profile:mix665k")]
    check_run(config, dry_run)
    return config, options


def _without_options(args: list[str]) -> list[str]:
    """A command line's words without those of `Options`."""
    kept, words = [], iter(args)
    for word in words:
        if word == "--as_if":
            next(words, None)
        elif word not in ("--dry_run", "--take_over") and not word.startswith("--as_if="):
            kept.append(word)
    return kept


def _resolve_paths(config: RunConfig) -> None:
    """Local paths as `paths.local_path` reads them; data sets and `checkpoint.dir`, which may be URLs, where they open.

    Raises:
        ValueError: naming the key.
    """
    keys = ["model", "run_dir", "checkpoint.resume", "data.cache_dir", "data.image_root", "evaluate.json"]
    keys += ["evaluate.images", *(["lora.start"] if config.lora else [])]
    for name in keys:
        room, _, key = name.rpartition(".")
        section = getattr(config, room) if room else config
        value = getattr(section, key)
        if value:
            try:
                setattr(section, key, str(local_path(value)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _sources(given: str | list[str | Source]) -> list[Source]:
    given = [given] if isinstance(given, str) else given
    for each in given:
        if isinstance(each, dict) or str(each).lstrip().startswith(("[", "{")):  # else all of it would be a path
            raise ValueError(f"data.sources, data.validation: {each} is no path and none of {{path, name, repeat}}")
    return [Source(s) if isinstance(s, str) else s for s in given]


def save_run(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML; `--config` reads it back to the same run."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
