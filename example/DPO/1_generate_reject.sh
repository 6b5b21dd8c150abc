#!/bin/sh
# Step 1: the base model itself writes the rejected answers, of the training part and of the held-out part.
#   sh example/DPO/1_generate_reject.sh [OUTPUT_FOLDER]
# The frequency penalty is low since this model's tokens are bytes: letters come back more often than words do.
set -eu
OUT=${1:-example/DPO/demo_output}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"
for part in dataset heldout; do
    "$PYTHON" rlhf_generate_reject_csv.py \
        --load_model example/DPO/base_model.pth \
        --input_csv "example/DPO/input_csv/rlhf_example_$part.csv" \
        --output_csv "$OUT/rlhf_example_${part}_withreject.csv" \
        --strategy 'cpu fp32' --max_tokens 160 --batch_size 64 --frequency 0.02
done
