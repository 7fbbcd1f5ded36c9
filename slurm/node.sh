#!/usr/bin/env bash
# One task of train.sbatch, and requests to stop handed on to its ranks. One task a node is torchrun
# with the node's ranks; one task a GPU (--ntasks-per-node=8) is a rank, placed by Slurm's variables.
set -euo pipefail
source slurm/common.sh

declare -A address
for entry in $TIDAR_NODES; do
  address[${entry%%=*}]="${entry#*=}"
done
first="$(printf '%s' "$TIDAR_NODES" | cut -d= -f1)"
is_host=false
if [[ "$SLURMD_NODENAME" == "$first" ]]; then
  is_host=true
fi
pids="$TIDAR_START_DIR/pids-$SLURMD_NODENAME-$SLURM_LOCALID"
mkdir -p "$pids"
export TIDAR_PIDS="$pids"

# Of the lines that torchrun passes on to the job's log: those of each node's first rank.
# shellcheck disable=SC2016  # torchrun fills it in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '

launch_rank() {
  trap '' USR1
  export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
  export LOCAL_WORLD_SIZE="$TIDAR_RANKS_PER_NODE"
  export MASTER_ADDR="${address[$first]}" MASTER_PORT="$TIDAR_PORT"
  exec "${python[@]}" slurm/rank.py "$@" >>"$log.out" 2>>"$log.err"
}

# What torchrun does itself: the lines of the node's first rank go on to the job's log. Not by a pipe
# of the rank's: a request to stop would end its other side before the rank has saved.
follow_first_rank() {
  if [[ "$SLURM_LOCALID" != 0 ]]; then return; fi
  trap '' USR1 TERM
  tail --quiet --lines=+1 --follow --sleep-interval=0.5 --pid="$agent" "$log.out" "$log.err" |
    sed --unbuffered "s/^/[rank $SLURM_PROCID] /"
}

launch_torchrun() {
  # SIGUSR1 would end torchrun, and a rank that is still importing; a rank that trains handles it.
  trap '' USR1
  # A session of its own: at SIGTERM torchrun gives its ranks 30 s, which may not do for saving.
  exec setsid "${python[@]}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$TIDAR_RANKS_PER_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="${address[$first]}:$TIDAR_PORT" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-conf="is_host=$is_host" \
    --local-addr="${address[$SLURMD_NODENAME]}" \
    --log-dir="$TIDAR_RANK_LOGS/$SLURMD_NODENAME" --redirects=3 --tee=0:3 \
    slurm/rank.py "$@"
}

ask_ranks() {
  local file
  for file in "$pids"/*; do
    if [[ -e "$file" ]]; then
      kill -USR1 "${file##*/}" 2>/dev/null || true
    fi
  done
}

# For restart.py: how and when this node failed, the first time alone. A rank that was killed leaves
# its process id behind; one that raised, often because another is gone, does not.
note_failure() {
  local file kind="$1"
  for file in "$pids"/*; do
    if [[ -e "$file" ]] && ! kill -0 "${file##*/}" 2>/dev/null; then kind=killed; fi
  done
  local record="$TIDAR_START_DIR/failed-$SLURMD_NODENAME@$SLURM_LOCALID"
  if [[ -n "$kind" && ! -e "$record" ]]; then echo "$kind $(date +%s.%N)" >"$record"; fi
}

asked=false
trap 'asked=true' USR1 TERM
if [[ "$TIDAR_TASKS_PER_NODE" == 1 ]]; then
  launch_torchrun "$@" &
else
  log="$TIDAR_RANK_LOGS/rank-$SLURM_PROCID"
  touch "$log.out" "$log.err"
  launch_rank "$@" &
fi
agent=$!
follower=
if [[ "$TIDAR_TASKS_PER_NODE" != 1 ]]; then
  follow_first_rank &
  follower=$!
fi
while kill -0 "$agent" 2>/dev/null; do
  # Again and again, for ranks that had not come to training yet. `wait`, since a signal ends it.
  if $asked; then ask_ranks; fi
  note_failure ''
  sleep 1 &
  wait $! || true
done
code=0
wait "$agent" || code=$?
if ((code != 0)); then note_failure raised; fi
if [[ -n "$follower" ]]; then wait "$follower" || true; fi
exit "$code"
