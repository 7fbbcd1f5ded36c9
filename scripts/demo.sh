#!/usr/bin/env bash
# The whole path in one file: text -> shards -> training with two processes -> decoding -> export.
# Run it with `make demo`. Interrupted with Ctrl-C and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
DATA=${DATA:-data/demo}
RUN=${RUN:-runs/demo}
export OMP_NUM_THREADS=1   # two processes, a core each
# A step on a CPU makes the tensors of the step before again: have malloc keep what is freed.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

say() { printf '\n== %s\n' "$*"; }

say "1/4 preparing Python's standard library in $DATA"
"$BIN/tidar-prepare" output_dir="$DATA" sequence_length=256 layout.block_size=8 \
  tokenizer.vocab_size=2048 workers=2

say "2/4 training with 2 processes under ZeRO-1 in $RUN (Ctrl-C saves; the same command goes on)"
# In a process group of its own, torchrun does not get the terminal's Ctrl-C: the workers alone are
# asked to stop, so they save in peace and torchrun ends without a crash report.
set -m
"$BIN/torchrun" --standalone --nproc-per-node 2 -m pipeline.train \
  experiment=demo data.dir="$DATA" run_dir="$RUN" "$@" &
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

say "3/4 decoding: the same prompt, a token a forward (ar) and with drafts (tidar)"
prompt='    def read(self, size=-1):
        """Read and return'
for method in ar tidar; do
  printf -- '-- method=%s\n%s' "$method" "$prompt"
  "$BIN/tidar-generate" checkpoint="$RUN" method=$method max_new_tokens=80 temperature=0.7 \
    prompt="$prompt"
done

say "4/4 exporting to $RUN/export, a Hugging Face folder"
"$BIN/tidar-export" checkpoint="$RUN" output="$RUN/export" overwrite=true

say "done; open $RUN/report.html"
