#!/bin/bash
# One fit over all GPUs of a Slurm job, whatever they are and however many each node has:
#   sbatch examples/slurm.sh image --data /shared/mnist --epochs 10
#SBATCH --job-name=anyfit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=TERM@120
# no-kill: a node that dies takes its ranks along and nothing else, unless it is the first one, which keeps the store.
# requeue, signal: a job that is put back, or told two minutes before its end, has saved, and begins where it was.
set -eu

# This script runs on the first node. A port for each job, since nodes may have several.
where="$(hostname):$((20000 + SLURM_JOB_ID % 10000))"

# One launcher on each node, which starts a rank for each of its GPUs.
srun --no-kill --kill-on-bad-exit=0 bash -c 'exec anyfit fit "$@" --nproc "${SLURM_GPUS_ON_NODE:-1}"' anyfit \
    "$@" --nnodes "$SLURM_JOB_NUM_NODES" --rdzv "$where" --run "${ANYFIT_RUN:-runs/slurm-$SLURM_JOB_ID}" --resume
