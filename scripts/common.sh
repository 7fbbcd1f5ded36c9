# Sourced by the demos: what they share. BIN is where the commands are.
BIN=${BIN:-.venv/bin}
export OMP_NUM_THREADS=1   # two processes, a core each
# A step on a CPU makes the tensors of the step before again: have malloc keep what is freed.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

say() { printf '\n== %s\n' "$*"; }

# Train with two processes and the keys given. Ctrl-C saves and leaves with 130; the same goes on.
train() {
  local torchrun code
  # In a process group of its own, torchrun does not get the terminal's Ctrl-C: the workers alone
  # are asked to stop, so they save in peace and torchrun ends without a crash report.
  set -m
  "$BIN/torchrun" --standalone --nproc-per-node 2 -m pipeline.train run_dir="$RUN" "$@" &
  torchrun=$!
  set +m
  trap 'pkill -INT -P "$torchrun" || true' INT TERM
  until wait "$torchrun"; do
    code=$?
    kill -0 "$torchrun" 2>/dev/null || exit "$code"   # ended, and not a wait cut short by a signal
  done
  trap - INT TERM
  if [ -e "$RUN/interrupted" ]; then
    exit 130
  fi
}
