# Sourced by the other scripts: creates .venv, installs the project into it, and activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "fastirt needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv .venv || { rm -rf .venv; echo "cannot create .venv: install your system's python3-venv package" >&2; exit 1; }
fi
extras=${extras:-dev} # "none": what users need
stamp=$(cksum < setup.py)
case $(cat .venv/.installed 2>/dev/null) in
"$stamp dev" | "$stamp $extras") ;;
*)
    echo "installing fastirt and its dependencies (about 8 GB, a few minutes)"
    target=.
    [ "$extras" = none ] || target=".[$extras]"
    # --use-pep517: if `wheel` is installed, pip would otherwise link the folder, hiding kernels/
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517 --editable "$target"
    echo "$stamp $extras" > .venv/.installed
    ;;
esac
. .venv/bin/activate
