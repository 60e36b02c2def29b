#!/usr/bin/env bash
# From a fresh machine to a trained, compared and drawn model, in a few minutes, without any download of data:
# scikit-learn's handwritten digits become picture files and shards; a small ResNet learns digits 0-4, is transferred to 5-9
# from a few labels per class, and is compared with the same network trained from scratch on the same labels.
# Two processes on the CPU, or one per GPU where there are GPUs. Running it again does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
say() { printf '\n== %s\n' "$*"; }

say "1/5 environment"
bash launch/env.sh quickstart
python=.venv/bin/python
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

say "2/5 pictures and shards: data/quickstart"
$python launch/digits.py data/quickstart/pictures
tlx shards build data/quickstart/pictures/source data/quickstart/shards/source
tlx shards build data/quickstart/pictures/target data/quickstart/shards/target

gpus=0
! ls /dev/nvidia[0-9]* /dev/kfd 2>/dev/null | grep -q . || gpus="$($python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 1 ]; then launch=(accelerate launch --config_file launch/one_node.yaml --num_processes "$gpus")
elif [ "$gpus" -eq 1 ]; then launch=(accelerate launch --config_file launch/one_gpu.yaml)
else launch=(accelerate launch --config_file launch/cpu.yaml); fi
verdict="$(mktemp)"
train() {  # under a launcher a mistake or a stop exits 0: the verdict tells
    : >"$verdict"
    TLX_VERDICT="$verdict" "${launch[@]}" -m tlx train "configs/quickstart/$1.yaml"
    grep -q '^{"status": "done"' "$verdict"
}

say "3/5 the source task: digits 0-4"
train pretrain
say "4/5 digits 5-9 from a few labels: transfer, then from scratch"
train transfer
train scratch
say "5/5 what came of it ($((SECONDS - started)) s in all)"
tlx report runs/quickstart/transfer runs/quickstart/scratch --out runs/quickstart
say "next, in any shell:"
printf 'cd %q && source .venv/bin/activate && tlx plan configs/quickstart/transfer.yaml\n' "$PWD"
