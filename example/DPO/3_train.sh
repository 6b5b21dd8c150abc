#!/bin/sh
# Step 3: DPO plus a share of SFT through LoRA, then the adapter merged back into an ordinary checkpoint.
#   sh example/DPO/3_train.sh [OUTPUT_FOLDER]
set -eu
OUT=${1:-example/DPO/demo_output}
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" train.py \
    --load_model example/DPO/base_model.pth \
    --rlhf_train_file "$OUT/rlhf_example_dataset.save" \
    --eval_file "$OUT/rlhf_example_heldout.save" \
    --proj_dir "$OUT/run" \
    --my_testing x070 --ctx_len 512 --rlhf_max_corpus_len 512 \
    --accelerator cpu --precision fp32 --strategy auto \
    --layer_profile auto --lr_init 2e-4 --lr_final 2e-5 --warmup_steps 5 \
    --epoch_steps 50 --epoch_count 3 --micro_bsz 4 \
    --dpo 1 --dpo_alpha 0.5 --dpo_beta 0.1 --sample_tokens 160
"$PYTHON" merge.py --base example/DPO/base_model.pth --adapter "$OUT/run/rwkv-final.safetensors" --output "$OUT/merged.pth"
