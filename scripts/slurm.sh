#!/usr/bin/env bash
# Train on several nodes under Slurm: one torchrun per node, one process per GPU.
#
#     sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh CONFIG key=value ...
#
# Submit it from the repository, on storage that all nodes share, in a shell whose PATH has the environment's
# torchrun. PROCESSES_PER_NODE=N starts N processes a node, as on nodes without GPUs; MASTER_PORT=N names a port.
#
# Two minutes before its time limit, and upon `scancel --signal=TERM JOB`, the run saves and stops. (Plain
# `scancel` leaves it 30 s, or what the site allows.) The same command continues it. Submitted several times with
# `--job-name NAME --dependency=singleton`, each job continues the one before; those left over end at once.

#SBATCH --job-name=gatework
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --mem=0
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
master_addr=${hosts%%$'\n'*}
master_port=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))} # below the ports that Linux hands out itself

# Seconds that torchrun gives its processes after SIGTERM, instead of 30: a checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

# When Slurm ends a job it sends SIGTERM to this shell as well as to the tasks. The shell must neither die of
# it, as the job ends with it, nor pass it on, as srun answers SIGTERM by killing its tasks: hence a trap that
# does nothing, and no `exec srun`.
trap : TERM

# Slurm signals a task but not the task's children, so the inner shell, which is there to read the node's
# number, becomes torchrun. --cpu-bind=none: all CPUs for the one task. --kill-on-bad-exit: a node that fails
# ends the job at once, and not when the other nodes have waited for it in vain.
# shellcheck disable=SC2016 # SLURM_NODEID is the task's
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --master-addr "$master_addr" --master-port "$master_port" train.py "$@"
