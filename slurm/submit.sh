#!/usr/bin/env bash
# Check a training run here, on the login node, and submit it only if it could start:
#
#   slurm/submit.sh [--dry-run] --nodes=4 --gpus-per-node=8 --exclusive \
#     experiment=tidar_1p5b data.dir=/data/mine run_dir=/runs/first
#
# What begins with - goes to sbatch, written with = or a space, all else to tidar-train; --config-dir
# is Hydra's, cluster.* and plan.* are the check's. Relative paths mean from where this was typed.
# Several values for a key (objective.alpha=0.3,1) are submitted as an array of runs, each checked.
# --dry-run prints the checks, the plan, the command and the script.
# Exit codes: 2 for what the checks refuse, else sbatch's.
set -euo pipefail
typed_in="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SLURM_SUBMIT_DIR="$PWD"
source slurm/common.sh

dry_run=false nodes=1 tasks="" gpus="" all_gpus=""
cpus="${SBATCH_CPUS_PER_GPU:-}${SBATCH_EXCLUSIVE:-}"
options=() overrides=() planning=()

# A number of GPUs in any of sbatch's words: 8, h100:8, gpu, gpu:8, gres/gpu:h100:8, gpu:a:2,gpu:b:2.
count_gpus() {
  local entry number total=0 kind="$1" entries
  IFS=, read -ra entries <<<"$2"
  for entry in "${entries[@]}"; do
    entry="${entry#gres[:/]}" number="${entry##*[:=]}"
    if [[ "$kind" == gres && "$entry" != gpu && "$entry" != gpu[:=]* ]]; then continue; fi
    if [[ ! "$number" =~ ^[0-9]+$ ]]; then
      if [[ "$kind" != gres ]]; then number="?"; else number=1; fi
    fi
    if [[ "$number" == "?" ]]; then echo "$2" && return; fi
    total=$((total + number))
  done
  if ((total > 0)); then echo "$total"; fi
}

# What of sbatch's options a plan has to know.
note_option() {
  case "$1" in
    --nodes | -N) nodes="$2" ;;
    --gpus-per-node | --gpus-per-task) gpus="$(count_gpus gpus "$2")" ;;
    --gres | --tres-per-node) gpus="$(count_gpus gres "$2")" ;;
    --gpus | -G) all_gpus="$(count_gpus gpus "$2")" ;;
    # One task a rank, as train.sbatch takes it.
    --ntasks-per-node) if [[ "$2" != 1 ]]; then tasks="$2"; fi ;;
    --cpus-per-task | -c | --cpus-per-gpu | --exclusive) cpus="${2:-all}" ;;
  esac
}

# A local path in an override, made absolute; what is a URL, quoted or worked out later stays.
from_here() {
  local key="${1%%=*}" path="${1#*=}"
  if [[ "$path" =~ ^[A-Za-z0-9._-] && "$path" != *://* && "$path" != pipe:* && "$path" != *,* &&
    "$path" != null ]]; then
    echo "$key=$typed_in/$path"
  else
    echo "$1"
  fi
}

note_option --gpus-per-node "${SBATCH_GPUS_PER_NODE:-}"
note_option --gres "${SBATCH_GRES:-}"
note_option --gpus "${SBATCH_GPUS:-}"
while (($#)); do
  argument="$1"
  shift
  name="$argument" value=""
  case "$argument" in
    --*=*) name="${argument%%=*}" value="${argument#*=}" ;;
    -[A-Za-z]?*) if [[ "$argument" != -cd ]]; then name="${argument:0:2}" value="${argument:2}"; fi ;;
  esac
  words=("$argument")
  # The next word is this option's value, unless it is an option or an override itself.
  if [[ "$argument" == -* && "$argument" != --dry-run && -z "$value" && $# -gt 0 &&
    ! "$1" =~ ^(-|~|\+*[a-z][A-Za-z0-9_./@]*=) ]]; then
    value="$1"
    words+=("$1")
    shift
  fi
  case "$name" in
    --dry-run) dry_run=true ;;
    --config-dir | -cd) overrides+=("$(from_here "--config-dir=$value")") ;;
    -m | --multirun) ;; # several values are a sweep without it, too
    -*)
      options+=("${words[@]}")
      note_option "$name" "$value"
      ;;
    init_from=*)
      # Of the form owner/name it is an id on the hub, unless there is such a folder.
      if [[ "$argument" =~ ^init_from=[^/.][^/]*/[^/]+$ && ! -e "$typed_in/${argument#*=}" ]]; then
        overrides+=("$argument")
      else
        overrides+=("$(from_here "$argument")")
      fi
      ;;
    cluster.* | plan.*) planning+=("$argument") ;;
    run_dir=* | data.dir=*) overrides+=("$(from_here "$argument")") ;;
    *) overrides+=("$argument") ;;
  esac
done
if [[ -n "$all_gpus" && "$nodes" =~ ^[1-9][0-9]*$ && "$all_gpus" =~ ^[0-9]+$ ]]; then
  if ((all_gpus % nodes)); then
    echo "error: --gpus=$all_gpus: not the same number on each of $nodes nodes; take --gpus-per-node" >&2
    exit 2
  fi
  gpus=$((all_gpus / nodes))
fi
ranks="${tasks:-${TIDAR_RANKS_PER_NODE:-${gpus:-1}}}"
if [[ ! "$nodes" =~ ^[1-9][0-9]*$ || ! "$ranks" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --nodes=$nodes --gpus-per-node=$ranks: one number each, so that it can be planned" >&2
  exit 2
fi
if [[ -z "$cpus" ]] && ((ranks > 1)); then
  echo "note: without --cpus-per-task Slurm may give the $ranks ranks of a node one CPU; say" \
    "--cpus-per-task (a task is a node here, or a rank with --ntasks-per-node), or --exclusive" >&2
fi
# A GPU of no name is not judged; processes without one share their host's memory.
if [[ -n "$gpus" ]]; then gpu="${TIDAR_GPU:-unknown}"; else gpu="${TIDAR_GPU:-cpu}"; fi
planning=("cluster.nodes=$nodes" "cluster.gpus_per_node=$ranks" "cluster.gpu=$gpu" "${planning[@]}")

# Several values for a key are a sweep: an array with one task for each run.
runs="$("${python[@]}" -m tidar_common.sweep count "${overrides[@]}")" || exit 2
for ((number = 0; number < runs; number++)); do
  run="$("${python[@]}" -m tidar_common.sweep nth "$number" "${overrides[@]}")"
  mapfile -t planned <<<"$run"
  if ((runs > 1)); then echo "run $number of the array: ${planned[-1]}"; fi
  "${python[@]}" -m pipeline.plan check=true "${planned[@]}" "${planning[@]}" || exit $?
done
if ((runs > 1)); then options+=("--array=0-$((runs - 1))"); fi
command=(sbatch "${options[@]}" slurm/train.sbatch "${overrides[@]}")
if $dry_run; then
  "${python[@]}" -m pipeline.plan "${planned[@]}" "${planning[@]}"
  echo "would submit: ${command[*]@Q}"
  cat slurm/train.sbatch
  exit
fi
# The job need not ask what was just answered.
TIDAR_PLAN_CHECK=off exec "${command[@]}"
