#!/usr/bin/env bash
# Trains on every GPU of a Slurm job, saves before the time is over, and queues itself again:
#
#   sbatch launch/slurm.sh gpt2-124m --data data/fineweb-edu --out runs/gpt2
#
# Data and runs lie on storage that all hosts share.
#SBATCH --job-name=rekindle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

told=
# The batch script is told two minutes before the end, and tells every rank, which save and stop.
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# How long ranks may save before torchrun kills them; that of torch 2.11 always does after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# One torchrun on each host starts a process for each GPU; if one dies, all begin anew from the
# newest checkpoint.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
    -m rekindle train "$@" &

status=0
wait $! || status=$?
if [ "$told" ]; then
    wait # for what is being saved; the signal has only ended the wait above
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
