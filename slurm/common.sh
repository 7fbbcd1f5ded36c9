# shellcheck shell=bash
# Sourced by every job script. Slurm runs a copy of the script, so the checkout is known only as the
# folder that sbatch was called in.
cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
if [[ ! -f slurm/cluster.env.example ]]; then
  echo "error: $PWD: not the checkout (no slurm/cluster.env.example); call sbatch in its top folder" >&2
  exit 2
fi
# The cluster's own copy of the example, which git ignores; without one the example's defaults.
settings="${TIDAR_CLUSTER_ENV:-slurm/cluster.env}"
if [[ -z "${TIDAR_CLUSTER_ENV:-}" && ! -f "$settings" ]]; then settings=slurm/cluster.env.example; fi
if [[ ! -f "$settings" ]]; then
  echo "error: TIDAR_CLUSTER_ENV: $settings is not there; copy slurm/cluster.env.example to it" >&2
  exit 2
fi
# shellcheck source=slurm/cluster.env.example
source "$settings"
tidar_modules

read -ra prefix <<<"$TIDAR_PREFIX"
# shellcheck disable=SC2034  # used by the scripts that source this
python=("${prefix[@]}" "$TIDAR_PYTHON")
if [[ -z "$TIDAR_PREFIX" ]] && ! command -v "$TIDAR_PYTHON" >/dev/null; then
  echo "error: TIDAR_PYTHON: $TIDAR_PYTHON is not there; run make setup or edit slurm/cluster.env" >&2
  exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
if [[ -n "$TIDAR_INTERFACE" ]]; then
  export NCCL_SOCKET_IFNAME="$TIDAR_INTERFACE" GLOO_SOCKET_IFNAME="$TIDAR_INTERFACE"
fi
