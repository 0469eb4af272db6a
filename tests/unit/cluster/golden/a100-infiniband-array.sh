#!/bin/bash
# A pretraining job, rendered by `infini-train submit`. `sbatch job.sh` in this folder submits it once more.
# slurm/README.md of the project explains what it does when.
#SBATCH --job-name=8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --exclude=node[07-09],node12
#SBATCH --array=0-2%2
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%A_%a.log

set -uo pipefail

run_dir=/data/runs/8b/task_$SLURM_ARRAY_TASK_ID

submit_dir=/home/user/infini_train
project=/home/user/infini_train
python=/home/user/infini_train/.venv/bin/python
max_failures=3
max_restarts=100

export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=WARN
export NCCL_NET=IB
export NCCL_IB_TIMEOUT=22
# Modules and environments that are activated may read variables that are not set.
set +u
module load cuda/12.4
set -u

job_dir=$run_dir/job
# A task's own number can be that of the whole array, so tasks are named by both.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}

# What happened goes to the log and to job/history, which `infini-train status` shows.
say() {
  printf '%s job %s start %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$job" "$((restarts + 1))" "$*" | tee -a "$job_dir/history"
}

# SLURM may have requeued this job already and even started it elsewhere, while this script lives on: on a lost node, for example.
end_if_replaced() {
  local now
  now=$(scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')
  if [ "${now:-0}" -gt "$restarts" ]; then
    say "requeued by SLURM; this start ends, exit code $1; newest checkpoint: $(newest_checkpoint)"
    exit "$1"
  fi
}

# Put this job back into the queue, without the nodes that the preflight found bad.
requeue() {
  # SLURM ends this script with TERM as soon as it is requeued; there is something left to do.
  trap '' TERM
  end_if_replaced 1
  say "requeued: $*"
  if ! scontrol requeue "$job"; then
    say "SLURM did not requeue it; submit again to go on"
    exit 1
  fi
  if [ -s "$job_dir/excluded" ]; then
    local nodes
    # An update replaces what was excluded before.
    nodes=$({ sort -u "$job_dir/excluded"; echo 'node[07-09],node12'; } | paste -sd, -)
    scontrol update JobId="$job" ExcNodeList="$nodes" || say "SLURM did not exclude $nodes"
  fi
  exit 0
}

newest_checkpoint() {
  local newest
  newest=$(find "$run_dir/checkpoints" -mindepth 2 -maxdepth 2 -name COMMITTED 2>/dev/null | sort | tail -n 1)
  if [ -n "$newest" ]; then basename "$(dirname "$newest")"; else echo none; fi
}

# Try again, unless that was tried before and no checkpoint was written since.
failed() {
  local newest tries
  end_if_replaced 1
  newest=$(newest_checkpoint)
  echo "$newest" >>"$job_dir/failures"
  tries=$(grep -c -x -e "$newest" "$job_dir/failures")
  if [ "$tries" -ge "$max_failures" ]; then
    say "stopped: $*; $tries failures since the newest checkpoint ($newest), and max_failures is $max_failures"
    exit 1
  fi
  requeue "$*; failure $tries of $max_failures since the newest checkpoint ($newest)"
}

end_if_cancelled() {
  if [ -e "$job_dir/cancelled" ]; then
    say "cancelled (exit code $1); newest checkpoint: $(newest_checkpoint)"
    exit "$1"
  fi
}

# Why the ranks stop: "requeue" (time limit or preemption is near) or "end" (scancel, or a requeue that SLURM does itself).
stopping=
ask_ranks_to_save() {
  if [ -z "$stopping" ]; then say "told to stop; ranks save"; fi
  stopping=${stopping:-requeue}
  # Without --batch it reaches the ranks and not this script.
  scancel --signal=USR1 "$job"
}
be_terminated() {
  # A cluster that preempts without a signal before: SLURM would cancel the job, not requeue it.
  if scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; then stopping=${stopping:-requeue}; else stopping=end; fi
}
trap ask_ranks_to_save USR1
trap be_terminated TERM

# Run a command once a rank, with the variables of torch.distributed; the code is the highest of the ranks' exit codes.
on_all_ranks() {
  local ranks code_file=$job_dir/exit_code
  rm -f "$code_file"
  (
    # A signal that comes while this shell waits makes its `wait` return anything: srun's code goes through a file.
    trap : TERM USR1
    code=0
    # The shell of each rank expands these variables, not this one.
    # shellcheck disable=SC2016
    srun --export=ALL --kill-on-bad-exit=0 --wait=60 --distribution=block --cpus-per-task=8 \
      bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
        LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec "$@"' rank "$@" || code=$?
    echo "$code" >"$code_file"
  ) &
  ranks=$!
  while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
  return "$(cat "$code_file" 2>/dev/null || echo 137)"
}

if ! mkdir -p "$job_dir" || ! cd "$submit_dir"; then
  echo "error: run_dir $run_dir cannot be written, or $submit_dir is not there, on $(hostname)" >&2
  exit 2
fi
if [ -e "$job_dir/finished" ]; then
  say "finished before; nothing to do"
  exit 0
fi
if [ -e "$job_dir/cancelled" ]; then
  say "cancelled; submit again to go on"
  exit 0
fi
if [ "$restarts" -gt "$max_restarts" ]; then
  say "stopped: requeued $restarts times, and max_restarts is $max_restarts; submit again to go on"
  exit 1
fi

# Where the ranks meet: the first node's address, as SLURM knows it. Node names need not resolve.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
if [ -z "$address" ]; then
  failed "SLURM names no address for node ${first:-(unknown)}, where the ranks would meet"
fi
export MASTER_ADDR=$address
# A port of this node, the first, that nobody listens on, and below those that the system gives to outgoing connections. In bash
# alone, because $python may be in the image of the ranks and not here.
free_port() {
  local port try
  for try in {1..100}; do
    port=$((10000 + (RANDOM + try - 1) % 20000))
    if ! grep -qs "^ *[0-9]*: [0-9A-F]*:$(printf '%04X' "$port") " /proc/net/tcp /proc/net/tcp6; then
      echo "$port"
      return
    fi
  done
  return 1
}
say "starts on $SLURM_JOB_NODELIST; ranks meet at $address"

if ! MASTER_PORT=$(free_port); then failed "$first has no free port"; fi
export MASTER_PORT
on_all_ranks "$python" "$project/launch/preflight.py" --folder "$run_dir" --gpus_per_node 8 \
  --minimum_gigabytes_per_second 0.0
code=$?
end_if_cancelled "$code"
case $stopping in
  requeue) requeue "told to stop during the preflight" ;;
  end) exit "$code" ;;
esac
if [ "$code" -ne 0 ]; then
  if [ "$code" -eq 3 ] && [ -s "$job_dir/bad_nodes" ]; then
    cat "$job_dir/bad_nodes" >>"$job_dir/excluded"
    failed "preflight: $(paste -sd, "$job_dir/bad_nodes") will be left out"
  fi
  if [ "$code" -eq 127 ]; then failed "$python is not there where the ranks run"; fi
  failed "preflight ended with exit code $code"
fi

if ! MASTER_PORT=$(free_port); then failed "$first has no free port"; fi
export MASTER_PORT
on_all_ranks "$python" -m infini_train pretrain --config "$job_dir/config.yaml"
code=$?

end_if_replaced "$code"
end_if_cancelled "$code"
# Not before, because srun was seen to return 0 for ranks that did not finish when SLURM ended them.
case $stopping in
  requeue) requeue "told to stop, exit code $code; newest checkpoint: $(newest_checkpoint)" ;;
  end)
    say "ended by SLURM or scancel, exit code $code; newest checkpoint: $(newest_checkpoint)"
    exit "$code"
    ;;
esac
case $code in
  0)
    touch "$job_dir/finished"
    say "finished"
    ;;
  2 | 87)
    say "stopped: exit code $code, which starting again does not mend; the error stands above in the log"
    exit "$code"
    ;;
  85) requeue "a rank was told to stop; newest checkpoint: $(newest_checkpoint)" ;;
  86) failed "the job hung, exit code 86" ;;
  127) failed "$python is not there where the ranks run" ;;
  *) failed "a rank crashed or was killed, exit code $code" ;;
esac
