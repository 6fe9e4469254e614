"""Stage 1, feature alignment: the projector learns to speak the language model's embeddings, from captions.

    accelerate launch --config_file accelerate_configs/h100x8_fsdp.yaml scripts/pretrain.py \\
        --model models/vicuna-7b --data.sources s3://bucket/pretrain558k --run_dir runs/pretrain

The same program as finetune.py with another recipe. Without --config it runs Vicuna-7B's.
"""

from finetune import RECIPES, main

if __name__ == "__main__":
    main(RECIPES / "vicuna-7b" / "pretrain.yaml")
