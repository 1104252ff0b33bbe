#!/bin/bash
#SBATCH --job-name=impressions
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# One torchrun a machine, one process a core. The folder must lie on a file system that all machines share.
# A job that is requeued, or submitted again, goes on where it stopped.
set -eu
: "${RECIPE:=mnist-half}" "${OUT:=out/store}" "${SIZE:=1000000}"

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # so that processes started anew do not look for the dead
export TORCH_GLOO_LAZY_INIT=1                 # connections are made when they are used
export OMP_NUM_THREADS=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_CPUS_PER_TASK" --max-restarts 20 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29400" \
    -m zskd_nni synthesize "$RECIPE" --out "$OUT" --size "$SIZE" --threads 1
