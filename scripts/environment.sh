# Sourced by test.sh and quickstart.sh: a virtual environment in .venv with the pinned packages of some extras.
#
#   prepare_environment EXTRAS     e.g. prepare_environment train,demo
#
# Installs again only when the pins, the package's metadata or the extras have changed. Uses `python3`, or $PYTHON.

prepare_environment() {
    unset PYTHONDONTWRITEBYTECODE  # or every process would compile all that it imports
    local extras=$1 python=${PYTHON:-python3} stamp=.venv/.installed-$1 wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "Python 3.10 or newer is needed; set PYTHON to its path (found: $("$python" --version 2>&1))" >&2
        return 1
    }
    wanted=$(cat constraints.txt setup.cfg pyproject.toml | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "environment: .venv is up to date"
        return 0
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "environment: installing into .venv (first time: one or two minutes and 1.5 GB; more where a GPU build is served)"
    # what is imported is compiled then, and kept: half of the time of an install goes into files that nobody imports
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile)
    pip+=(--constraint constraints.txt)
    # a pip of today finds its files in half the time that the one of Python 3.11 takes
    "${pip[@]}" pip setuptools wheel
    # torch before what depends on it: a resolver that sees it pinned and installed never looks at another build. What
    # else is large and depends on nothing that is asked of here goes in beside it.
    "${pip[@]}" --no-deps transformers pyarrow numpy &
    "${pip[@]}" torch
    wait $!
    # what every command imports of torch is compiled while the rest comes in
    .venv/bin/python -c 'import torch._dynamo, torch.distributed.tensor' &
    PYTHONWARNINGS='ignore:Editable installation' "${pip[@]}" --no-build-isolation --editable ".[$extras]"
    wait $!
    echo "$wanted" > "$stamp"
}
