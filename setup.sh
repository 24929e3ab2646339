#!/bin/sh
# Sets up system libraries, the Python environment .venv, and pinned packages. `make setup` runs this.
#
# `./setup.sh tests`, used by `make test`, also installs programs without which some tests are skipped.
# Safe to run again: only missing parts are installed, and a stamp file marks a complete set-up.
# PYTHON=/path/to/python3.12 chooses the interpreter (>= 3.11); otherwise it is that of the active conda or virtual
# environment, or else the newest on PATH.
set -eu
cd "$(dirname "$0")"

VENV=.venv
STAMP=$VENV/.fastkd-setup # written last, so an incomplete environment has none
# ffcv has no wheels: it is compiled against OpenCV and libturbojpeg. The python3 packages are for the system's Python.
APT_PACKAGES="build-essential pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv"
APT_DATASET=dataset-fashion-mnist # optional: without the package, the writer downloads the files

# for tests: a browser for the report page, and tools to simulate two hosts on one machine
APT_TESTS="chromium iproute2 bindfs"

say() { echo "setup: $*"; }
die() {
    echo "setup: $*" >&2
    exit 1
}

# --- system libraries ---------------------------------------------------------------------------------------------

not_installed() { # prints the given packages that are not installed
    for package; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s ' "$package"
    done
}

may_be_root() { # sudo may ask for a password only on a terminal
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q "$@"; }

libraries_found() { # the libraries that compiling ffcv needs, from any source (ffcv searches opencv4, then opencv)
    command -v g++ >/dev/null && command -v pkg-config >/dev/null || return 1
    pkg-config --exists libturbojpeg && { pkg-config --exists opencv4 || pkg-config --exists opencv; }
}

install_libraries_with_apt() {
    # shellcheck disable=SC2086 # lists of package names are meant to be split
    missing=$(not_installed $APT_PACKAGES)
    dataset=$(not_installed $APT_DATASET)
    [ -n "$missing$dataset" ] || return 0

    if ! may_be_root; then
        [ -z "$dataset" ] || say "note: $APT_DATASET is not installed; its writer will download Fashion-MNIST"
        [ -n "$missing" ] || return 0
        libraries_found || die "these packages are missing and need root or sudo: $missing
  Run:  apt-get update && apt-get install -y $missing
  and then 'make setup' again."
        say "note: not installed by apt, but compiler and libraries were found; continuing without: $missing"
        return 0
    fi
    apt_get update || say "note: 'apt-get update' failed; continuing with the existing package lists"
    if [ -n "$dataset" ] && ! apt-cache show $APT_DATASET >/dev/null 2>&1; then
        say "note: apt has no $APT_DATASET here; its writer will download Fashion-MNIST"
        dataset=
    fi
    [ -n "$missing$dataset" ] || return 0
    say "apt installs: $missing$dataset"
    # shellcheck disable=SC2086
    apt_get install -y --no-install-recommends $missing $dataset || die "apt-get could not install: $missing$dataset"
}

install_for_tests() { # one by one: if a package cannot be installed, only the tests that need it are skipped
    command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || return 0
    # shellcheck disable=SC2086
    missing=$(not_installed $APT_TESTS)
    [ -n "$missing" ] || return 0
    if ! may_be_root; then
        say "note: not installed, so the tests that need them are skipped: $missing"
        return 0
    fi
    apt_get update || say "note: 'apt-get update' failed; continuing with the existing package lists"
    for package in $missing; do
        apt_get install -y --no-install-recommends "$package" ||
            say "note: $package cannot be installed; the tests that need it are skipped"
    done
}

install_libraries() {
    if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
        install_libraries_with_apt
    elif ! libraries_found; then
        die "this system has no apt. Compiling ffcv needs g++, pkg-config, and the headers of OpenCV 4 and libturbojpeg,
  which pkg-config must find as 'opencv4' and 'libturbojpeg'. Install them with the system's package manager or from
  conda-forge (see CONTRIBUTING.md), then run 'make setup' again."
    fi
}

# --- Python environment -------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # prints the interpreter to use; each is run first, since a name on PATH may be a broken shim
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than 3.11"
        echo "$PYTHON"
        return
    fi
    for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [ -n "$active" ] && is_new_enough "$active/bin/python"; then
            # Its base interpreter, since the active environment may be $VENV, which may be removed.
            "$active/bin/python" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    for candidate in python3.13 python3.12 python3.11 python3; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python >= 3.11 found (python3 is: $(version_of python3 || echo missing)). Install one, then run:
  PYTHON=/path/to/python3.12 make setup"
}

fingerprint() { # of everything that determines the environment; includes the path, since the install is editable
    echo "$(pwd) $(version_of $VENV/bin/python) $(cat pyproject.toml constraints.txt setup.sh | cksum)"
}

venv_is_sound() { # it runs, has pip, and has the requested version
    $VENV/bin/python -m pip --version >/dev/null 2>&1 && is_new_enough $VENV/bin/python || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of $VENV/bin/python)" ]
}

is_finished() {
    [ -f $STAMP ] && [ "$(cat $STAMP)" = "$(fingerprint)" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of $VENV/bin/python)" ]
}

make_venv() {
    python=$(find_python)
    version=$(version_of "$python")
    "$python" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null || die \
        "$python ($version) lacks venv or its C headers. On Debian or Ubuntu:  apt-get install python${version%.*}-venv python${version%.*}-dev"
    say "creating $VENV with $python ($version)"
    rm -rf $VENV
    "$python" -m venv $VENV
}

install_packages() {
    say "installing the packages of constraints.txt (torch with CUDA is a download of some GB; ffcv is compiled)"
    # First upgrade pip: the versions included with Python build sdists differently. Builds are constrained, too: ffcv's
    # setup.py imports distutils, which Python 3.12 and later get only from some releases of setuptools.
    { $VENV/bin/python -m pip install -c constraints.txt --upgrade pip &&
        $VENV/bin/python -m pip install -c constraints.txt --build-constraint constraints.txt \
            -e '.[bench,dev,digits,docs,export,hf,tensorboard,timm]'; } ||
        die "pip failed (see above). If $VENV may be damaged:  rm -rf $VENV && make setup"
}

packages_import() {
    $VENV/bin/python -c 'import fastkd, fastkd.data.ffcv_import, numba, numpy, scipy, sklearn, timm, torch, torchvision
import onnx, onnxruntime, onnxscript, tensorboard
import hypothesis, mypy, pytest, xdist, zensical'
}

# --- main ---------------------------------------------------------------------------------------------------------

[ "${1:-}" != tests ] || install_for_tests
if is_finished; then
    say "$VENV is up to date"
    exit 0
fi
install_libraries
rm -f $STAMP
venv_is_sound || make_venv
install_packages
if ! packages_import; then # after an interrupted install, files that pip has recorded may be missing
    say "$VENV is damaged: creating it again"
    make_venv
    install_packages
    packages_import || die "the packages are installed but do not import; 'python3 fastkd/doctor.py' may say why"
fi
fingerprint >$STAMP
say "done. Next:  . $VENV/bin/activate, then  fastkd doctor  or  make demo"
