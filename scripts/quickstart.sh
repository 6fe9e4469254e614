#!/usr/bin/env bash
# From a bare machine to a trained, exported and answering model: real scanned digits, both stages, FSDP2 on two
# processes (CPU: gloo; with GPUs: all of them). Needs Python 3.10+ and, for the installation only, a package index.
# Finished parts are reused when it runs again; `rm -r demo` starts over. QUICKSTART_DIR: another folder than demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

demo=${QUICKSTART_DIR:-demo}
# AnyRes canvases of the model as [[height, width], ...]; [[32,32]] alone switches the grid off
pinpoints=${QUICKSTART_PINPOINTS:-}
python=.venv/bin/python
began=$SECONDS

part() { # part NAME COMMAND...: runs a part and keeps its time
    local name=$1 start=$SECONDS
    shift
    echo; echo "== $name"
    "$@"
    times+="$(printf '%-12s %4d s' "$name" $((SECONDS - start)))"$'\n'
}

walk() { # walk PART: the commands of a part of the path; scripts/reproduce.py has them, and skips what is there and whole
    $python scripts/reproduce.py digits --step "$1" --out "$demo" --gpus "$gpus" ${pinpoints:+--pinpoints "$pinpoints"}
}

times=""
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu) # before OMP_NUM_THREADS, which nproc would answer with
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

part install prepare_environment train,demo
export HF_HUB_OFFLINE=1 # from here on nothing is fetched

gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
echo "running on $([ "$gpus" -gt 0 ] && echo "$gpus GPU(s)" || echo "$cores CPU core(s), two processes")"

for name in data compose shards stage-1 stage-2 answers; do
    part "$name" walk "$name"
done

[ -z "$pinpoints" ] && echo "with the grid switched off an earlier run read 30.0 %, and 93.6 % with it (scripts/benchmarks/README.md)"
echo; printf '%s' "$times"; printf '%-12s %4d s\n' total $((SECONDS - began))
