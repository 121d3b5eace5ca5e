# Sourced by the scripts beside it: makes .venv with the given extras, once, and puts it first on PATH.
# Works on Linux and macOS with Python 3.11 to 3.13. PYTHON names another interpreter.
prune_environment() {
    extras=$1
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || exit 1
    if [ ! -x .venv/bin/python ]; then
        for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
            if command -v "$candidate" >/dev/null 2>&1 &&
                "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
                "$candidate" -m venv .venv && break
            fi
        done
        if [ ! -x .venv/bin/python ]; then
            echo "error: needs Python 3.11, 3.12 or 3.13 with its venv module; PYTHON=/path/to/python names one" >&2
            exit 1
        fi
    fi
    sum=$(cksum <pyproject.toml)
    have=$(cat .venv/prune-installed 2>/dev/null || true)
    if [ "$have" != "$extras $sum" ] && [ "$have" != "[test] $sum" ]; then  # [test] holds all the others
        echo "installing into .venv (torch is large: a few minutes on a first run)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras" || exit 1
        echo "$extras $sum" >.venv/prune-installed
    fi
    PATH="$root/.venv/bin:$PATH"
    export PATH
}
