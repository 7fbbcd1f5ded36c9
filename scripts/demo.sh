#!/usr/bin/env bash
# The whole path in one file: text -> shards -> training with two processes -> decoding -> export.
# Run it with `make demo`. Interrupted with Ctrl-C and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data/demo}
RUN=${RUN:-runs/demo}
source scripts/common.sh

say "1/4 preparing Python's standard library in $DATA"
"$BIN/tidar-prepare" output_dir="$DATA" sequence_length=256 layout.block_size=8 \
  tokenizer.vocab_size=2048 workers=2

say "2/4 training with 2 processes under ZeRO-1 in $RUN (Ctrl-C saves; the same command goes on)"
train experiment=demo data.dir="$DATA" "$@"

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
