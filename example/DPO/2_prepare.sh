#!/bin/sh
# Step 2: tokenize the pairs and cache the base model's log-probabilities of both answers.
#   sh example/DPO/2_prepare.sh [OUTPUT_FOLDER]
set -eu
OUT=${1:-example/DPO/demo_output}
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" rlhf_dpo_generate_save.py \
    --load_model example/DPO/base_model.pth \
    --input_csv "$OUT/rlhf_example_dataset_withreject.csv" \
    --output_save "$OUT/rlhf_example_dataset.save" \
    --target_pair_count 800 --strategy 'cpu fp32' --rlhf_max_corpus_len 512
# Held-out pairs: every row once.
"$PYTHON" rlhf_dpo_generate_save.py \
    --load_model example/DPO/base_model.pth \
    --input_csv "$OUT/rlhf_example_heldout_withreject.csv" \
    --output_save "$OUT/rlhf_example_heldout.save" \
    --strategy 'cpu fp32' --rlhf_max_corpus_len 512
