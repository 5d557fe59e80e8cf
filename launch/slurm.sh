#!/usr/bin/env bash
# Trains on all GPUs of a Slurm job, saves a checkpoint before the time limit, and requeues itself:
#
#   sbatch launch/slurm.sh gpt2-124m --data data/fineweb-edu --out runs/gpt2
#
# The data and run folders must be on storage that all hosts share.
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

stopping=
# Slurm signals this script two minutes before the time limit. The script signals all ranks, which
# save a checkpoint and stop.
trap 'stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Seconds that the ranks have to save before torchrun kills them. torchrun of torch 2.11 ignores it
# and always waits 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# One torchrun per host starts a process for each GPU. If one dies, all of them restart from the
# newest checkpoint.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
    -m rekindle train "$@" &

status=0
wait $! || status=$?
if [ "$stopping" ]; then
    wait # until the checkpoint is saved; the signal has only interrupted the wait above
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
