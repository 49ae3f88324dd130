#!/bin/bash
# A run on N nodes under Slurm, which saves before its time is over, queues itself again and goes on by itself.
#   sbatch --nodes 4 launch/slurm.sh CONFIG.yaml --run /shared/runs/NAME [--section.key value ...]
# Everything of "adapt" below is the cluster's. What is done, and why so: launch/README.md.
# --- adapt ---
#SBATCH --job-name=llm-cht
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llm-cht-%j.log

ENGINE=${ENGINE:-zero2}      # ddp, zero1, zero2, zero3 or zero2_offload, as in launch/accelerate/
PYTHON=${PYTHON:-.venv/bin/python}
# export NCCL_SOCKET_IFNAME=ib0   # the network between the nodes, where NCCL or gloo finds the wrong one
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO
# --- end of adapt ---

set -u
run="" last=""
for argument in "$@"; do
    [ "$last" != --run ] || run=$argument
    [[ $argument != --run=* ]] || run=${argument#--run=}
    last=$argument
done
if [ -z "$run" ]; then
    echo "slurm.sh: error: give the folder of the run, on a file system that all nodes share, by --run FOLDER" >&2
    exit 2
fi

case $ENGINE in
    ddp) export ACCELERATE_USE_DEEPSPEED=false ;;
    zero[123] | zero2_offload)
        export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=${ENGINE:4:1}
        [ "$ENGINE" != zero2_offload ] || export ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu
        ;;
    *)
        echo "slurm.sh: error: ENGINE = $ENGINE; known: ddp, zero1, zero2, zero3, zero2_offload" >&2
        exit 2
        ;;
esac

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

# Whether a checkpoint was saved since this attempt began is how a fault that may pass is told from one that will not.
newest() { find "$run/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }
complete() { tail -n 1 "$run/metrics.jsonl" 2>/dev/null | grep -q '"kind": "end"'; }
before=$(newest)

# scancel tells the ranks to save, too: then the job is not to come back
cancelled=
trap 'cancelled=yes' TERM

# One task a rank, with no launcher between: Slurm's signal goes to the ranks, which finish their step, save and leave.
# Every task sees all GPUs of its node (no --gpus-per-task, no binding) and takes that of its local number.
# shellcheck disable=SC2016  # the variables are the task's
srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) GROUP_RANK=$SLURM_NODEID
    exec "$0" launch/train.py "$@"' "$PYTHON" "$@" --resume auto
code=$?

if complete; then
    echo "slurm.sh: $run is complete"
    exit "$code"
fi
if [ -n "$cancelled" ]; then
    echo "slurm.sh: $run was cancelled; not queued again" >&2
    exit 1
fi
if [ "$code" -eq 2 ]; then
    echo "slurm.sh: $run stopped by a mistake that would come again (above); not queued again" >&2
    exit 2
fi
if [ "$code" -ne 0 ] && [ "$(newest)" = "$before" ]; then
    echo "slurm.sh: $run stopped with code $code before it saved anything; not queued again" >&2
    exit "$code"
fi
echo "slurm.sh: $run is not complete (code $code); queued again, goes on from $(newest)"
scontrol requeue "$SLURM_JOB_ID"
