#!/usr/bin/env bash
# A SLURM job: sbatch --nodes=4 scripts/train.slurm.sh --dataset sop --data-path /data/SOP --output-dir /shared/run
# One task a node; torchrun starts a rank for each of its GPUs. Before the time is up, or the job gives way to another, SLURM sends SIGTERM:
# the ranks leave a checkpoint, and the job, requeued by SLURM or submitted again with the same line, goes on from it.
#SBATCH --job-name=fastirt
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
: "${SLURM_JOB_NODELIST:?submit this script with sbatch}"
cd "${SLURM_SUBMIT_DIR:-.}"
if ! command -v fastirt > /dev/null; then . scripts/setup.sh; fi # here, before all nodes want it at once
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES HEAD=${HEAD:-$head:$((20000 + SLURM_JOB_ID % 20000))} JOB=$SLURM_JOB_ID
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take the job's
srun --kill-on-bad-exit=1 bash scripts/train.nodes.sh --resume "$@"
