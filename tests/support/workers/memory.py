"""Run under `accelerate launch`: peak memory of a second training step, as the CPU allocator counts it.

Usage: memory.py MODEL_FOLDER OUT_FILE CASES, where cases is a JSON list of [policy, reshard, [frozen module, ...],
rank of LoRA or 0, whether it is in 4 bits, optimizer, master].
Everything a run holds is allocated under the profiler: the sharded model, the optimizer's state, a step of an empty
micro-batch, and one of an empty and a full one. Writes a list of peak bytes, and tokens, tiles and targets of rank 0's
full micro-batch.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from llava_next.model.forward.attention import attention_names
from llava_next.model.forward.lora import Lora, add_adapters, quantise_under
from llava_next.model.forward.modeling import LlavaNextForConditionalGeneration
from llava_next.training.devices.parallel import build_accelerator, finish, shard
from llava_next.training.recipe.low_memory import quantile_maps
from llava_next.training.recipe.optim import Rates, build_optimizer, freeze
from support.tiny import geometry, pack_tiny, random_samples
from support.tracing import find_torchao


def batch_of(config, rank: int, count: int):
    """A micro-batch of samples with an image each."""
    anyres, side = geometry(config), config.vision_config.image_size
    sizes = {"max_text": 100, "sizes_of": lambda rng: tuple(int(x) for x in rng.integers(side, 3 * side, 2))}
    return pack_tiny([e for e, _ in random_samples(rank, count, images=(1,), anyres=anyres, **sizes)], anyres)


def peak_bytes(profiler) -> int:
    """The most that was allocated at a time.

    What gloo's threads free is not recorded; it shows when the address is given out again.
    """
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes, live, peak = {}, 0, 0
    for _, address, size in sorted(found, key=lambda event: event[0]):
        live -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            live += size
        peak = max(peak, live)
    return peak


def measure(
    accelerator,
    folder: str,
    policy: str,
    reshard: bool,
    frozen: list[str],
    rank: int,
    nf4: bool,
    name: str,
    master: str,
) -> dict:
    """Two steps of a fresh model under the eyes of the allocator."""
    plugin, on_gpu = accelerator.state.fsdp_plugin, accelerator.device.type == "cuda"
    if name == "adamw8bit":  # what torchao's import takes is no part of it
        find_torchao()
        quantile_maps(accelerator.device)
    plugin.activation_checkpointing, plugin.reshard_after_forward = policy != "none", reshard
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    watch = nullcontext() if on_gpu else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with watch as profiler:
        model = LlavaNextForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            attn_implementation=attention_names("varlen" if on_gpu else "sdpa"),
        )
        rates = Rates(**{name: None if name in frozen else 1e-3 for name in ("llm", "projector", "vision", "newline")})
        if nf4:
            quantise_under(model, Lora(r=rank), torch.bfloat16 if on_gpu else torch.float32, accelerator.device)
        if rank:
            add_adapters(model, Lora(r=rank), seed=0)
        freeze(model, rates)
        model, optimizer = shard(
            accelerator,
            model,
            lambda m: build_optimizer(m, rates, (0.9, 0.999), 1e-8, 0.0, name),
            policy,
            False,
            master,
        )
        # beside two samples, what gloo's threads hold on to is little
        batch = batch_of(model.config, accelerator.process_index, count=accelerator.num_processes)
        short = pack_tiny([], geometry(model.config))
        for micros in ([short], [short, batch]):  # the first step makes the optimizer's state, the second has gradients
            for micro in micros:
                model(**micro.model_inputs(accelerator.device), num_sources=2).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.free_memory()
    sizes = {"tokens": len(batch.input_ids), "tiles": len(batch.tiles), "targets": len(batch.target_ids)}
    return {"peak": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(profiler), **sizes}


def main(folder: str, out: str, cases: str) -> None:
    torch.set_num_threads(1)
    accelerator = build_accelerator()
    results = [measure(accelerator, folder, *case) for case in json.loads(cases)]
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(results))
    finish(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
