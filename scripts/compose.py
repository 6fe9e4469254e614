"""Makes a LLaVA-NeXT model folder from a vision tower and a language model.

    python scripts/compose.py --vision openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 \\
        --template vicuna_v1 --out models/vicuna-7b

Both may be local folders. `--demo TRAIN.json` builds the quickstart's tiny model instead: random weights, and a
tokenizer trained on that file's text.
"""

import json
from pathlib import Path

from jsonargparse import ArgumentParser

from llava_next.model.compose import compose, llm_part, load_tokenizer, random_part, vision_part
from llava_next.model.dry import DEMO_PINPOINTS, corpus_texts, demo_configs, train_tokenizer


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vision", help="CLIP or SigLIP checkpoint: folder or hub repository")
    parser.add_argument("--llm", help="Llama, Qwen2 or Mistral checkpoint: folder or hub repository")
    parser.add_argument("--demo", help="LLaVA JSON file: build the tiny demo model for it")
    parser.add_argument("--template", default="vicuna_v1", help="chat template saved with the model")
    parser.add_argument("--pinpoints", type=list[tuple[int, int]] | None, help="canvases as [[height, width], ...]")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    parser.add_argument("--out", required=True, help="new model folder")
    args = parser.parse_args()

    if args.demo:
        vision_config, llm_config = demo_configs()
        samples = json.loads(Path(args.demo).read_text())
        vision, llm = random_part(vision_config, args.seed), random_part(llm_config, args.seed)
        tokenizer = train_tokenizer(corpus_texts(samples, args.template), vocab_size=llm_config.vocab_size - 2)
        args.pinpoints = args.pinpoints or DEMO_PINPOINTS
    elif args.vision and args.llm:
        vision, llm = vision_part(args.vision), llm_part(args.llm)
        tokenizer = load_tokenizer(args.llm)
    else:
        parser.error("give --vision and --llm, or --demo")

    try:
        folder = compose(vision, llm, tokenizer, args.template, args.out, args.pinpoints, args.seed)
    except ValueError as error:
        parser.error(str(error))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(f"{folder}: {vision.config.model_type} + {llm.config.model_type}, {size / 1e6:,.1f} MB, {args.template}")


if __name__ == "__main__":
    main()
