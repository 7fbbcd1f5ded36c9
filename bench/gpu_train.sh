#!/usr/bin/env bash
# Evidence on one GPU, in pieces of ten minutes: a 100M-class AR model from scratch, TiDAR continual
# training from its checkpoint, an AR twin that goes on for the same tokens, then held-out bits per
# byte and decode speed (batch 1, CUDA graphs). Writes bench/results/gpu_train-<device>.json.
#
#   until bash bench/gpu_train.sh; do [ $? = 75 ] || break; done
#
# Exit codes: 0 all is done, 75 the time of this piece is over and the same command goes on, other
# codes are those of the command that failed. Everything can be set from outside:
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
WORK=${WORK:-runs/gpu_train}            # text, data, runs
BUDGET_S=${BUDGET_S:-560}               # seconds of one piece
TRAIN_S=${TRAIN_S:-90}                  # training is only begun with this much left
MARGIN_S=${MARGIN_S:-45}                # of it for the last step and its save
EVAL_S=${EVAL_S:-240}                   # an evaluation is only begun with this much left
CORPUS=${CORPUS:-installed}             # installed: all Python sources beside the project; stdlib
DATA=${DATA:-}                          # or a folder written by tidar-prepare, of any text
LENGTH=${LENGTH:-2048}
VOCAB=${VOCAB:-32000}
MAX_BYTES=${MAX_BYTES:-}                # stop after this much text
EXPERIMENT=${EXPERIMENT:-tidar_100m}
OBJECTIVE=${OBJECTIVE:-tidar}         # of the continual training
AR_STEPS=${AR_STEPS:-600}
STEPS=${STEPS:-300}                     # of the continual training, and of its twin
SEED=${SEED:-0}
EXTRA=${EXTRA:-}                        # further overrides for every training run
EVAL_EXTRA=${EVAL_EXTRA:-}              # and for the evaluation of TiDAR
DEVICE=${DEVICE:-cuda}
RESULTS=${RESULTS:-bench/results}
SAVED=75                                # what tidar-train leaves with when it was stopped and saved
BEGAN=$SECONDS

left() { echo $((BUDGET_S - (SECONDS - BEGAN))); }
pause() { echo "gpu_train: time is over ($1 comes next); the same command goes on"; exit $SAVED; }
need() { [ "$(left)" -ge "$1" ] || pause "$2"; }

prepare() {
  [ -z "$DATA" ] || return 0
  DATA=$WORK/text/data
  [ ! -f "$DATA/manifest.json" ] || return 0
  "$PYTHON" -m bench.experiments.corpus "$CORPUS" "$WORK/text" --sequence-length "$LENGTH" \
    --vocab-size "$VOCAB" ${MAX_BYTES:+--max-bytes "$MAX_BYTES"}
}

# train NAME STEPS OVERRIDE...: once, in as many pieces as it takes.
train() {
  local name=$1 steps=$2; shift 2
  [ ! -f "$WORK/$name.done" ] || return 0
  need "$TRAIN_S" "$name"
  local code=0
  # shellcheck disable=SC2086
  "$PYTHON" -m pipeline.train experiment="$EXPERIMENT" data.dir="$DATA" run_dir="$WORK/$name" \
    seed="$SEED" steps="$steps" stop_before="$(left)s" stop_margin_s="$MARGIN_S" wandb.mode=disabled \
    "$@" $EXTRA || code=$?
  [ $code != $SAVED ] || pause "the rest of $name"
  [ $code = 0 ] || exit $code
  touch "$WORK/$name.done"
}

# evaluate NAME OVERRIDE...: once.
evaluate() {
  local name=$1; shift
  [ ! -f "$WORK/$name.json" ] || return 0
  need "$EVAL_S" "the evaluation of $name"
  "$PYTHON" -m pipeline.evaluate checkpoint="$WORK/$name" data.dir="$DATA" device="$DEVICE" \
    output="$WORK/$name.json" "$@"
}

mkdir -p "$WORK"
prepare
train ar "$AR_STEPS" objective=ar
train tidar "$STEPS" objective="$OBJECTIVE" init_from="$WORK/ar"
train twin "$STEPS" objective=ar init_from="$WORK/ar"
evaluate twin evals=likelihood
# shellcheck disable=SC2086
evaluate tidar 'evals=[decode_speed,likelihood]' \
  'evals.decode_speed.methods=[ar,tidar,tidar_chosen]' $EVAL_EXTRA
"$PYTHON" -m bench.gpu_result --work "$WORK" --device "$DEVICE" --results "$RESULTS"
