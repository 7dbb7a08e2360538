#!/bin/bash
# Train on several nodes, and resume without help after a preemption or at the time limit.
#
#   sbatch --nodes 2 docs/slurm.sh recipes/llemma7b.yaml --deepspeed ds_configs/zero3.json --gradient_accumulation_steps 2
#   ENGINE="--config_file ds_configs/fsdp2.yaml" sbatch --nodes 2 docs/slurm.sh recipes/llemma7b.yaml --gradient_accumulation_steps 2
#
# Submit it from the repository, on storage that all nodes see; the recipe needs save_strategy: steps. docs/multinode.md explains.

#SBATCH --job-name=matrix_llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

ENGINE=${ENGINE:---use_deepspeed --deepspeed_multinode_launcher standard}
PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export ENGINE PER_NODE MAIN PORT
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds between the launcher's SIGTERM and SIGKILL; 30 s otherwise

# one launcher a node; SLURM_NODEID differs from node to node, so it is expanded there
LOG=$(mktemp)
srun bash -c 'exec accelerate launch $ENGINE --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PER_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" \
    matrix_llm/train.py "$@" --resume_from_checkpoint true' node "$@" 2>&1 | tee "$LOG"
STATUS=$?

# A run that was told to stop has saved a checkpoint and printed how to resume. Any other failure would only repeat.
if grep -q '^=> resume with: ' "$LOG"; then
    scontrol requeue "$SLURM_JOB_ID"
    STATUS=0
fi
rm -f "$LOG"
exit "$STATUS"
