"""Makes a LLaVA-NeXT model folder from a vision tower and a language model.

    python scripts/compose.py --vision openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 \\
        --template vicuna_v1 --out models/vicuna-7b

Both may be local folders. `--random_init` builds the same architectures with random weights and without network, whole
or shrunk (`--scale`), for tests and throughput runs; their tokenizer is a small one, or that of `--tokenizer`.
`--demo TRAIN.json` builds the quickstart's tiny model instead: random weights, and a tokenizer trained on that file's
text.
"""

from pathlib import Path

from jsonargparse import ArgumentParser

from llava_next.data.format.records import read_record
from llava_next.data.inputs.listing import list_json
from llava_next.model.folders import dry
from llava_next.model.folders.compose import (
    FEATURE_LAYER,
    compose,
    llm_part,
    load_tokenizer,
    random_part,
    vision_part,
)
from llava_next.own_template import NAMES, template_for
from llava_next.paths import folder_or_name, local_path, new_folder
from llava_next.templates import OWN, Template
from llava_next.tokenise import listed


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vision", type=folder_or_name, help="CLIP or SigLIP checkpoint: folder or hub repository")
    parser.add_argument(
        "--llm", type=folder_or_name, help="checkpoint of a dense language model: folder or hub repository"
    )
    about = "folder or hub repository of the tokenizer; default: the language model's"
    parser.add_argument("--tokenizer", type=folder_or_name, help=about)
    parser.add_argument("--random_init", action="store_true", help="random weights; nothing is downloaded")
    parser.add_argument("--scale", default="full", choices=list(dry.SCALES), help="size of a --random_init model")
    parser.add_argument("--demo", type=local_path, help="JSON file of records: build the tiny demo model for it")
    about = f"chat template saved with the model: {', '.join(NAMES[1:])}, which is the language model's own"
    parser.add_argument("--template", default="vicuna_v1", help=about)
    about = "special tokens of the tokenizer that data may contain, e.g. '<loc_1>' '<loc_2>'; kept in the model folder"
    parser.add_argument("--data_tokens", nargs="+", default=[], metavar="TOKEN", help=about)
    parser.add_argument("--pinpoints", type=list[tuple[int, int]] | None, help="canvases as [[height, width], ...]")
    about = "layer of the tower that features are taken from, as in hidden_states"
    parser.add_argument("--vision_feature_layer", type=int, default=FEATURE_LAYER, help=about)
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    parser.add_argument("--out", type=new_folder, required=True, help="new model folder")
    args = parser.parse_args()
    if not args.demo and not (args.vision and args.llm):
        parser.error("give --vision and --llm, or --demo")
    if args.scale != "full" and not args.random_init:
        parser.error(f"--scale {args.scale} needs --random_init: published weights have one size")
    try:
        vision, llm, tokenizer = parts(args)
        how = (args.pinpoints, args.seed, args.data_tokens, args.vision_feature_layer)
        folder = compose(vision, llm, tokenizer, args.template, args.out, *how)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for note in (*llm.notes, *undeclared_note(template_for(args.template, tokenizer), tokenizer)):
        print(f"note: {note}")
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(f"{folder}: {vision.config.model_type} + {llm.config.model_type}, {size / 1e6:,.1f} MB, {args.template}")


def parts(args):
    """Tower, language model and tokenizer that the command line asks for. Raises ValueError."""
    if args.template == OWN and (args.demo or (args.random_init and not args.tokenizer)):
        raise ValueError("--template own is that of a language model's tokenizer: name one (--tokenizer)")
    names = ("", "")
    if args.demo:
        vision_config, llm_config = dry.demo_configs()
        args.pinpoints = args.pinpoints or dry.DEMO_PINPOINTS
        texts = dry.corpus_texts(read_samples(args.demo), args.template)
        tokenizer = dry.train_tokenizer(texts, vocab_size=llm_config.vocab_size - 2)
    elif args.random_init:
        found = dry.architecture(args.vision), dry.architecture(args.llm, of_llm=True)
        vision_config, llm_config = (dry.scaled(config, args.scale) for config in found)
        names = [architecture_name(given, args.scale) for given in (args.vision, args.llm)]
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            tokenizer = dry.train_tokenizer(dry.corpus_texts([], args.template), 512, args.template)
            if args.scale != "full":
                # with all its rows a thin model would be nothing but embedding
                llm_config.vocab_size = len(tokenizer)
                for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                    setattr(llm_config, name, getattr(tokenizer, name))
    else:
        return vision_part(args.vision), llm_part(args.llm), load_tokenizer(args.tokenizer or args.llm)
    vision, llm = (
        random_part(config, args.seed, name) for config, name in zip((vision_config, llm_config), names, strict=True)
    )
    return vision, llm, tokenizer


def architecture_name(given: str, scale: str) -> str:
    """What the card calls an architecture: its published name or its folder's, and how it was shrunk."""
    name = given if given in dry.ARCHITECTURES else Path(given).resolve().name
    return name if scale == "full" else f"{name}, {scale}"


def undeclared_note(template: Template, tokenizer) -> list[str]:
    """What a person should know of special tokens that were added to a tokenizer and that no data token declares."""
    found = template.undeclared_tokens(tokenizer)
    if not found:
        return []
    return [
        f"the tokenizer has the special tokens {listed(found)}: data that spells them is trained as "
        "characters, at inference each is one token. Name those that data may contain (--data_tokens)"
    ]


def read_samples(path: Path) -> list[dict]:
    """The samples of a JSON file, their conversations in the stored form. Raises ValueError."""
    listing = list_json(path, seed=0)
    records = map(listing.reader.read, listing.addresses)
    return [read_record(record, allow_text_image_token=True)._asdict() for record in records]


if __name__ == "__main__":
    main()
