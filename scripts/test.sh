#!/usr/bin/env bash
# The test suite on a bare machine with Python 3.10+: environment, lint, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment train,demo,dev
# on no path but that of its own tests: transformers imports it in every process that finds it, half a second each
torchao=.venv/apart/$(grep '^torchao==' constraints.txt)
[ -d "$torchao" ] || .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps \
    --target "$torchao" --constraint constraints.txt torchao
export LLAVA_NEXT_TORCHAO=$PWD/$torchao
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
