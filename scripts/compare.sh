#!/usr/bin/env bash
# The comparison of docs/results.md: every strategy on one model, calibrated on a neutral corpus and once in-domain, under one budget after the other.
# usage: compare.sh EVOP MODEL DATA OUT [OPTION ...]      options go to every `evop compare`, such as --device cuda --dtype bf16 --sequences 40
# MODEL is a checkpoint. DATA has c4/validation-2k.jsonl.gz, wikitext-2-raw/{valid,test}.txt.gz, books/{calibration,held-out}.txt.gz and
# tasks/{arc_easy,piqa,hellaswag,lambada_openai}.jsonl.gz. It goes on where it was stopped; OUT/*/compare.html shows what is there.
# JOBS=6 runs as many comparisons side by side: on a GPU one alone leaves it waiting for launches.
set -euo pipefail
evop=$1 model=$2 data=$3 out=$4; shift 4
mkdir -p "$out"
levels=$out/levels

# compare NAME CALIBRATION [OPTION ...]
compare() {
  local name=$1 calibration=$2; shift 2
  "$evop" compare --model "$model" --calibration "$data/$calibration" --levels "$levels" --out "$out/$name" \
    --eval-text "wikitext-2=$data/wikitext-2-raw/test.txt.gz" --eval-text "books=$data/books/held-out.txt.gz" --eval-window 512 "$@"
}
tasks=(--tasks "$data/tasks/arc_easy.jsonl.gz,$data/tasks/piqa.jsonl.gz,$data/tasks/hellaswag.jsonl.gz,$data/tasks/lambada_openai.jsonl.gz" --limit 500)
c4=c4/validation-2k.jsonl.gz

running=0
job() {
  if [ "${JOBS:-1}" -le 1 ]; then "$@"; return; fi
  "$@" &
  running=$((running + 1))
  if [ "$running" -ge "$JOBS" ]; then wait -n; running=$((running - 1)); fi
}

# joint first: it makes the calibration and the levels that others share, and says how many patterns random-joint draws
compare c4 $c4 "${tasks[@]}" --strategies joint "$@"
job compare c4 $c4 "${tasks[@]}" --strategies joint,random-joint,uniform "$@"
job compare c4 $c4 "${tasks[@]}" --strategies evop,evopress,sleb,prune-comp "$@"
job compare c4 $c4 "${tasks[@]}" --strategies flap,twossp,policy-gradient,magnitude "$@"
job compare c4 $c4 "${tasks[@]}" --strategies shortgpt,blockpruner,finercut,crash,flatten,surrogate-shapley,random "$@"
for sparsity in 0.5 0.375 0.125; do
  job compare c4 $c4 "${tasks[@]}" --sparsity $sparsity --strategies joint,random-joint "$@"
  job compare c4 $c4 "${tasks[@]}" --sparsity $sparsity --strategies evopress,sleb,prune-comp,evop "$@"
  job compare c4 $c4 "${tasks[@]}" --sparsity $sparsity --strategies flap,twossp "$@"
done
job compare in-domain-wikitext wikitext-2-raw/valid.txt.gz --strategies joint,sleb,flap,twossp,evopress "$@"
job compare in-domain-books books/calibration.txt.gz --strategies joint,sleb,flap,twossp,evopress "$@"
job compare random-documents $c4 --strategies joint --mixing random "$@"
# what the search costs: the block space as EvoPress has it, and each saving switched off alone
job compare block-space $c4 --strategies joint,evopress --space block --compensation none --skip-compensation none --key-tokens 0 "$@"
for off in memo prefix racing seeds surrogate; do
  job compare "without-$off" $c4 --strategies joint "--no-$off" "$@"
done
wait
