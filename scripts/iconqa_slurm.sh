#!/usr/bin/env bash
# scripts/iconqa_4x4090.sh as a Slurm job on one node with four GPUs. Five minutes before its time is over it is told
# to stop: the run writes a checkpoint, the job queues itself again and goes on where it was.
#
# Usage: sbatch scripts/iconqa_slurm.sh [METHOD ...] [key=value ...]; variables as there, for example
#   SEEDS="0 1 2" sbatch --partition=gpu --time=12:00:00 scripts/iconqa_slurm.sh lora lorasculpt
# To submit from the checkout, where .venv or an active environment holds mmtune. Nodes without a network need what
# is downloaded beforehand: mmtune import, and the originals of the data.
#SBATCH --job-name=mmtune-iconqa
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
if [ -z "${SLURM_SUBMIT_DIR:-}" ]; then
  echo "this script is for sbatch; without Slurm: bash scripts/iconqa_4x4090.sh" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit 2

# Said again: newer versions of srun don't take the number of cores over from sbatch.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" bash scripts/iconqa_4x4090.sh "$@"
code=$?
if [ "$code" -eq 143 ]; then  # stopped by SIGTERM, with a checkpoint
  echo "out of time; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
