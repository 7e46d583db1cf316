# Sourced: makes the environment ($VENV or .venv) with the package and the given extra, in the tested versions, and activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv} extra=${1:-} python=${PYTHON:-python3}
$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; name one: PYTHON=python3.12 $0" >&2; exit 1; }

if [ ! -x "$VENV/bin/pip" ]; then  # libp2p needs fastecdsa, which pip compiles
    headers=$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if ! { $python -m ensurepip --version && printf '#include <Python.h>\n#include <gmp.h>\n' | gcc -E -I"$headers" -; } >/dev/null 2>&1; then
        name=$(basename "$($python -c 'import os, sys; print(os.path.realpath(sys.executable))')")
        install="apt-get update -qq && apt-get install -y -qq $name-venv $name-dev gcc libgmp-dev"
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
            { echo "A C compiler and the headers of Python and GMP are needed. Run once: sudo sh -c '$install'" >&2; exit 1; }
        DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null </dev/null
    fi
    $python -m venv "$VENV"
fi
. "$VENV/bin/activate"
unset PYTHONDONTWRITEBYTECODE  # modules are compiled when they are first imported, and only then
wanted=$(cat settings.ini setup.py pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat "$VENV/.lah_nb$extra" 2>/dev/null)" != "$wanted" ]; then  # 21,000 modules: most are never imported
    pip install -q --no-compile --disable-pip-version-check -c scripts/constraints.txt -e ".${extra:+[$extra]}"
    for done in "" ${extra//,/ } "$extra"; do echo "$wanted" > "$VENV/.lah_nb$done"; done
fi
