#!/usr/bin/env bash
# Check a training run here, on the login node, and submit it only if it could start:
#
#   slurm/submit.sh [--dry-run] --nodes=4 --gpus-per-node=8 --exclusive \
#     experiment=tidar_1p5b data.dir=/data/mine run_dir=/runs/first
#
# What begins with - goes to sbatch (write --name=value; a value of its own is no option), all else
# to tidar-train. Several values for a key (objective.alpha=0.3,1) are submitted as an array of runs,
# each checked. --dry-run prints the checks, the plan, the command and the script.
# Exit codes: 2 for what the checks refuse, else sbatch's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SLURM_SUBMIT_DIR="$PWD"
source slurm/common.sh

dry_run=false nodes=1 gpus="${TIDAR_RANKS_PER_NODE:-}" tasks=""
options=() overrides=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --nodes=* | -N[0-9]*)
      options+=("$argument") nodes="${argument#--nodes=}" nodes="${nodes#-N}"
      ;;
    --gpus-per-node=* | --gres=gpu:*)
      # 8, or with a type: h100:8.
      options+=("$argument") gpus="${TIDAR_RANKS_PER_NODE:-${argument##*[=:]}}"
      ;;
    --ntasks-per-node=*)
      # One task a rank, as train.sbatch takes it.
      options+=("$argument")
      if [[ "${argument##*=}" != 1 ]]; then tasks="${argument##*=}"; fi
      ;;
    -N | -p | -A | -t | -w | -x | -J | -G | -q)
      echo "error: $argument: write options of sbatch with = (--nodes=4, --partition=gpu)" >&2
      exit 2
      ;;
    -*) options+=("$argument") ;;
    *) overrides+=("$argument") ;;
  esac
done
gpus="${tasks:-$gpus}"
if [[ ! "$nodes" =~ ^[1-9][0-9]*$ || ! "${gpus:-1}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --nodes=$nodes --gpus-per-node=${gpus:-1}: one number each, so that it can be planned" >&2
  exit 2
fi
cluster=("cluster.nodes=$nodes" "cluster.gpus_per_node=${gpus:-1}"
  ${TIDAR_GPU:+"cluster.gpu=$TIDAR_GPU"})

# Several values for a key are a sweep: an array with one task for each run.
runs="$("${python[@]}" -m tidar_common.sweep count "${overrides[@]}")" || exit 2
for ((number = 0; number < runs; number++)); do
  run="$("${python[@]}" -m tidar_common.sweep nth "$number" "${overrides[@]}")"
  mapfile -t planned <<<"$run"
  if ((runs > 1)); then echo "run $number of the array: ${planned[-1]}"; fi
  "${python[@]}" -m pipeline.check "${planned[@]}" "${cluster[@]}" || exit $?
done
if ((runs > 1)); then options+=("--array=0-$((runs - 1))"); fi
command=(sbatch "${options[@]}" slurm/train.sbatch "${overrides[@]}")
if $dry_run; then
  "${python[@]}" -m pipeline.plan "${planned[@]}" "${cluster[@]}"
  echo "would submit: ${command[*]@Q}"
  cat slurm/train.sbatch
  exit
fi
# The job need not ask what was just answered.
TIDAR_PLAN_CHECK=off exec "${command[@]}"
