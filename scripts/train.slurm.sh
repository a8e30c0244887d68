#!/usr/bin/env bash
# A SLURM job:
#   sbatch --nodes=4 scripts/train.slurm.sh \
#       --method irt-r --dataset sop --data-path /data/SOP --output-dir /shared/run
# SLURM starts one task per node, torchrun one rank per GPU. Before the time limit or a preemption
# SLURM sends SIGTERM and the ranks save a checkpoint. The job continues from it when SLURM requeues
# it or when it is submitted again with the same command.
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
if ! command -v fastirt > /dev/null; then . scripts/setup.sh; fi # here, before all nodes need it at once
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES HEAD=${HEAD:-$head:$((20000 + SLURM_JOB_ID % 20000))} JOB=$SLURM_JOB_ID
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from the job
srun --kill-on-bad-exit=1 bash scripts/train.nodes.sh --resume "$@"
