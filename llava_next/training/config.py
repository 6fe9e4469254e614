"""The configuration of a run: typed dataclasses filled from YAML and the command line.

An unknown key is an error, every value is checked before anything is loaded, and the resolved configuration is saved
in the run folder.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser

from llava_next.training.optim import Rates


@dataclass
class Source:
    """A data set of the mixture.

    Args:
        path: folder with dataset.json, local or a URL.
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
        sources: data sets of the mixture: a path, or a list of paths and `Source`s.
        template: chat template of the training text; `plain` in stage 1.
        keep_template: allow a model folder whose saved chat template is not this one (a published llava-hf folder's
            own); the result keeps the folder's, so it is asked in another form than it was trained in.
        batch_size: samples of an optimizer step, over all ranks.
        epochs: passes over the mixture.
        max_length: tokens of a sample, image tokens included; longer ones are cut at the end.
        token_budget: tokens of a micro-batch on one rank. Changes speed and memory, never the result.
        tile_budget: tiles of a micro-batch on one rank.
        shuffle_shards: shards per shuffle window; null shuffles the whole data set.
        num_workers: loader processes per rank; 0 loads in the training process.
        max_skip_share: share of undecodable samples above which the run stops.
    """

    sources: str | list[str | Source] = field(default_factory=list)
    template: str = "vicuna_v1"
    keep_template: bool = False
    batch_size: int = 128
    epochs: int = 1
    max_length: int = 4096
    token_budget: int = 8192
    tile_budget: int = 48
    shuffle_shards: int | None = None
    num_workers: int = 4
    max_skip_share: float = 0.001


@dataclass
class OptimConfig:
    """Optimizer, schedule and loss. Defaults: the published recipe.

    Args:
        rates: peak learning rate per module.
        betas, eps, weight_decay: of AdamW.
        warmup_ratio: share of the steps with linear warm-up.
        max_grad_norm: clipping; null switches it off (the original DeepSpeed runs had none).
        loss_weighting: `token`: every supervised token of a step counts the same; `sample`: every sample;
            `micro_batch_mean`: token mean in groups of 8 samples in plan order, mean over groups, as the original.
    """

    rates: Rates = field(default_factory=Rates)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 1.0
    loss_weighting: Literal["token", "sample", "micro_batch_mean"] = "token"


@dataclass
class CheckpointConfig:
    """Checkpoints in the run folder.

    Args:
        every: steps between checkpoints; 0 writes none but the last.
        keep_last: how many are kept.
        resume: `auto` continues from the newest one of the run folder, `never` starts anew (and refuses a run folder
            that has checkpoints), a path continues from that one.
    """

    every: int = 500
    keep_last: int = 2
    resume: str = "auto"


@dataclass
class RunConfig:
    """A training run.

    Args:
        model: folder of the model to start from (see scripts/compose.py), or of stage 1's result.
        run_dir: where config, metrics, checkpoints and the resulting `model/` go.
        data, optim, checkpoint: see there.
        attn_implementation: segment attention's kernel: torch's varlen (CUDA), flash-attn, one SDPA call a segment, or
            the best that runs here.
        seed: of the data order.
        max_steps: stop after this many steps although the schedule goes on; null runs to the end.
        log_every: steps between console lines.
    """

    model: str = ""
    run_dir: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    attn_implementation: Literal["auto", "varlen", "flash", "sdpa"] = "auto"
    seed: int = 42
    max_steps: int | None = None
    log_every: int = 10


def run_parser(default_recipe: Path | None = None) -> ArgumentParser:
    """Command line of the training scripts: `--config FILE` and every key of `RunConfig` as `--a.b value`.

    Args:
        default_recipe: read first when the command line names no `--config`.
    """
    parser = ArgumentParser(
        description="Trains a LLaVA-NeXT model.",
        usage="%(prog)s [--config RECIPE.yaml] [--KEY VALUE ...]   (--help lists the keys)",
    )
    parser.add_argument("--config", action="config", help="YAML recipe; later options override it")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop; needs no GPU and no weights")
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    if default_recipe is not None:
        parser.default_config_files = [str(default_recipe)]
    return parser


def parse_run(args: list[str] | None = None, default_recipe: Path | None = None) -> tuple[RunConfig, bool]:
    """The run's configuration and whether `--dry_run` was given. Exits with a message on an unknown key or wrong type.

    Raises:
        ValueError: a value that cannot work, naming the key.
    """
    args = sys.argv[1:] if args is None else args
    names_a_recipe = any(a == "--config" or a.startswith("--config=") for a in args)
    parser = run_parser(None if names_a_recipe else default_recipe)
    values = parser.instantiate(parser.parse_args(args)).as_dict()
    values.pop("config", None)
    dry_run = values.pop("dry_run")
    config = RunConfig(**values)
    sources = config.data.sources
    sources = [sources] if isinstance(sources, str) else sources
    config.data.sources = [Source(s) if isinstance(s, str) else s for s in sources]
    check_run(config)
    return config, dry_run


def save_run(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML; `--config` reads it back to the same run."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def check_run(config: RunConfig) -> None:
    """Raises ValueError naming the first key whose value cannot work."""

    def require(condition: bool, key: str, message: str) -> None:
        if not condition:
            raise ValueError(f"{key}: {message}")

    data, optim = config.data, config.optim
    require(bool(config.model), "model", "missing; give the folder made by scripts/compose.py or by stage 1")
    require(bool(config.run_dir), "run_dir", "missing; give the folder for config, metrics, checkpoints and result")
    require(bool(data.sources), "data.sources", "missing; give one or more data set folders")
    for key in ("batch_size", "epochs", "max_length", "token_budget", "tile_budget"):
        require(getattr(data, key) > 0, f"data.{key}", f"must be positive, not {getattr(data, key)}")
    require(
        data.token_budget >= data.max_length,
        "data.token_budget",
        f"{data.token_budget} is smaller than data.max_length {data.max_length}: a sample would not fit a micro-batch",
    )
    require(data.max_length > 1, "data.max_length", "must be at least 2 tokens")
    require(all(s.repeat > 0 for s in data.sources), "data.sources", "repeat must be positive")
    require(0 <= optim.warmup_ratio < 1, "optim.warmup_ratio", f"must be in [0, 1), not {optim.warmup_ratio}")
