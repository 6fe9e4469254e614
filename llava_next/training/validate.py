"""Held-out loss: the same forward on data that is never trained on, summed per source over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from llava_next.training.devices.agreement import take_step
from llava_next.training.recipe.config import RunConfig
from llava_next.training.setup import Parts, open_feed, open_mixture


class Validation:
    """The held-out data of a run (`data.validation`), read anew each time in the same order.

    Args:
        config: of the run; its `data.validation` takes the place of the sources, everything else is the training's.

    Raises:
        ValueError: as for the training's data.
    """

    def __init__(self, config: RunConfig, parts: Parts):
        data = replace(config.data, sources=config.data.validation, epochs=1)
        self.config, self.parts = replace(config, data=data), parts
        self.mixture = open_mixture(self.config, parts)
        self.steps = min(self.mixture.total_steps, config.data.validation_steps or self.mixture.total_steps)

    @torch.no_grad()
    def loss(self, model: nn.Module, accelerator: Accelerator, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Mean loss of a supervised token in each source, and `all` over all of them. A collective.

        None when a rank was asked to stop meanwhile: it is then measured when the run goes on.

        Args:
            stop: whether this rank was asked to.

        Raises:
            Exception: as `take_step`.
        """
        names, device = self.mixture.names, accelerator.device
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        rank, world = accelerator.process_index, accelerator.num_processes
        feed = open_feed(self.config, self.parts, self.mixture, rank, world, start_step=0)
        model.eval()
        try:
            for step in range(self.steps):
                micros, counts = take_step(feed, step, self.config.data.batch_size, stop)
                if counts.stop:
                    return None
                for batch in micros:
                    output = model(**batch.model_inputs(device), num_sources=len(names))
                    sums += torch.stack([output.source_loss, output.source_tokens])
        finally:
            model.train()
            feed.close()
        dist.all_reduce(sums)
        losses, tokens = sums.tolist()
        found = {name: loss / count for name, loss, count in zip(names, losses, tokens, strict=True) if count}
        return {**found, "all": sum(losses) / max(sum(tokens), 1)}
