#!/bin/bash
# What the GPUs of one host are asked together: losses, kills and resumption of every engine, then speed, memory and scaling.
#
#     OUT=results bash benchmarks/gpu/two_gpu.sh
#     SMALL=1 OUT=/tmp/results bash benchmarks/gpu/two_gpu.sh      # every part in small, on a CPU
#
# See common.sh for OUT, LIMIT and SITE.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT" || exit 1

RUNS=() DEEP=(--engines fsdp2 --layers 32 --batch 2 --no-single --steps 3)
[ -n "$SMALL" ] && RUNS=(--shape tiny --layers 2 --batch 2 --block-size 64 --steps 2) && DEEP+=("${RUNS[@]}")
describe_machine >"$RESULTS/machine.log" 2>&1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
part parity 130 "$PYTHON" benchmarks/training/engine_parity.py --out "$RESULTS/parity"
part distributed 300 "$PYTHON" benchmarks/training/distributed.py --cached --timeout 75 --out "$RESULTS/distributed" "${RUNS[@]}"
part whole_7b 90 "$PYTHON" benchmarks/training/distributed.py --timeout 85 --out "$RESULTS/whole_7b" "${DEEP[@]}"
finish two_gpu
