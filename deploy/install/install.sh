#!/bin/sh
# Installs Talkoot for this user on Linux or macOS. It never asks for root.
#
#     sh install.sh [--from SOURCE] [--join INVITE] [--service] [--dry-run]
#
#   --from SOURCE   what to install: a folder, a wheel, an archive, or the address of one. The default is the clone that
#                   contains this script.
#   --join INVITE   the invite, or @FILE with a file that holds it. The script then offers to host experts whenever you
#                   log in.
#   --service       accepts that offer in advance.
#   --dry-run       only prints the commands that would change something.
#
# What it does:
#
# 1. It looks for `uv`, which installs Python programs. If there is no uv, it downloads a pinned release into
#    ~/.local/share/talkoot, and checks its checksum.
# 2. `uv tool install` makes an environment for Talkoot. uv picks the build of torch for this machine, without CUDA if
#    there is no GPU, and installs a Python if the system's is too old or too new. If download.pytorch.org does not
#    answer, torch comes from your package index.
# 3. With --join, it offers to start a node whenever you log in.
#
# To remove all of it: `talkoot uninstall`. If that does not work: `uv tool uninstall talkoot`, or, if this script
# downloaded uv, `rm -r ~/.local/share/talkoot ~/.local/bin/talkoot`.

set -eu

uv_version=0.12.5
# checksums of uv's releases
sha256_of() {
    case $1 in
    x86_64-unknown-linux-gnu) echo 68a509da24b06b4223a1c0175fb5eb5bc79342b76cbeff0cfe51ac3f5b17b6b2 ;;
    aarch64-unknown-linux-gnu) echo 9bf43b4d1a07665bf64d4c4e710930b382321a785e0eb10aac07f46471f86a31 ;;
    aarch64-apple-darwin) echo 5bb0e5fe008a773c3dbcb97ff79cd89e1241464fe9d2f986d52ad8f1b037bd62 ;;
    esac
}
# where uv finds the builds of torch that suit a machine
torch_builds=https://download.pytorch.org/whl/cpu/torch/
# not 3.14, which lacks miniupnpc: nodes could not ask routers to forward a port
python='>=3.11,<3.14'
# torch takes 1 GB without CUDA, and 7 GB with it
needed_kib=2000000

fail() {
    echo "error: $*" >&2
    exit 1
}

# Runs a command, or only prints it.
run() {
    if [ "$dry_run" ]; then
        printf 'would run:'
        for word in "$@"; do printf " '%s'" "$word"; done
        echo
    else
        "$@"
    fi
}

main() {
    from='' invite='' service='' dry_run=''
    while [ $# -gt 0 ]; do
        case $1 in
        --from | --join)
            [ $# -ge 2 ] || fail "$1 needs a value"
            if [ "$1" = --from ]; then from=$2; else invite=$2; fi
            shift
            ;;
        --service) service=yes ;;
        --dry-run) dry_run=yes ;;
        -h | --help)
            echo "usage: sh install.sh [--from SOURCE] [--join INVITE] [--service] [--dry-run]"
            exit 0
            ;;
        *) fail "there is no option $1: --help lists them" ;;
        esac
        shift
    done
    [ ! "$service" ] || [ "$invite" ] || fail "--service needs --join INVITE"
    [ "${HOME:-}" ] || fail "HOME is not set: set it to your home folder"
    # wget knows only the name in lower case
    [ ! "${HTTPS_PROXY:-}" ] || export https_proxy="$HTTPS_PROXY"
    find_source
    find_target
    # Everything that the script downloads is in one folder, so that it can be removed as a whole.
    own=${XDG_DATA_HOME:-$HOME/.local/share}/talkoot
    check_folders
    find_uv
    find_python
    install_talkoot
    offer_service
}

find_source() {
    if [ ! "$from" ]; then
        # empty if the script comes through a pipe
        from=$(cd "$(dirname "$0")/../.." 2>/dev/null && pwd) || from=''
        grep -qs '^name = "talkoot"$' "$from/pyproject.toml" ||
            fail "this script is not in a clone of Talkoot: pass --from SOURCE"
    fi
    # uv would take the name of a folder for that of a package, and download it
    case $from in /*) ;; *) [ ! -e "$from" ] || from=$PWD/$from ;; esac
}

find_target() {
    case $(uname -s)-$(uname -m) in
    Linux-x86_64) target=x86_64-unknown-linux-gnu ;;
    Linux-aarch64 | Linux-arm64) target=aarch64-unknown-linux-gnu ;;
    Darwin-arm64) target=aarch64-apple-darwin ;;
    Darwin-x86_64) fail "torch no longer supports Macs with Intel processors: use another machine" ;;
    *) fail "torch does not support $(uname -s) on $(uname -m): use Linux on x86-64 or arm64, or a Mac with Apple silicon" ;;
    esac
    if [ "${target##*-}" = gnu ] && ls /lib/ld-musl-* >/dev/null 2>&1; then
        fail "torch needs glibc, but this system has musl: run Talkoot in a container (deploy/container/Containerfile)"
    fi
}

# The nearest folder above a path that exists.
existing() {
    folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    echo "$folder"
}

check_folders() {
    for folder in "$own" "$HOME/.local/bin"; do
        [ -w "$(existing "$folder")" ] || fail "can't write $(existing "$folder"): run this as the user who owns it, and check that the disk is not read-only"
    done
    free_kib=$(df -Pk "$(existing "$own")" | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge "$needed_kib" ] ||
        fail "only $((free_kib / 1000)) MB are free in $(existing "$own"): Talkoot with torch needs $((needed_kib / 1000)) MB"
}

find_uv() {
    if [ -x "$own/uv/uv" ]; then
        uv=$own/uv/uv
    elif command -v uv >/dev/null; then
        uv=$(command -v uv)
        "$uv" tool install --help 2>/dev/null | grep -q -e --torch-backend ||
            fail "$uv is too old to choose the build of torch: update it (\`uv self update\`), or remove it and run this again"
        return
    else
        uv=$own/uv/uv
        download_uv
    fi
    # What this uv downloads goes into Talkoot's folder too.
    export UV_TOOL_DIR="$own/tools" UV_PYTHON_INSTALL_DIR="$own/python" UV_CACHE_DIR="$own/cache"
}

download_uv() {
    archive=uv-$target.tar.gz
    url=https://github.com/astral-sh/uv/releases/download/$uv_version/$archive
    if [ "$dry_run" ]; then
        echo "would download uv $uv_version from $url to $uv"
        return
    fi
    scratch=$(mktemp -d) || fail "can't make a temporary folder: is the disk full?"
    trap 'rm -rf "$scratch"' EXIT
    trap 'exit 130' INT TERM
    if command -v curl >/dev/null; then
        curl --proto '=https' --tlsv1.2 --fail --silent --show-error --location --output "$scratch/$archive" "$url"
    elif command -v wget >/dev/null; then
        wget --quiet --output-document="$scratch/$archive" "$url"
    else
        fail "this needs curl or wget: install one of them, or uv"
    fi || fail "can't download $url: is there a network? Behind a proxy, set HTTPS_PROXY; without GitHub, install uv in another way, such as \`pip install uv\`"
    found=$(if command -v sha256sum >/dev/null; then sha256sum "$scratch/$archive"; else shasum -a 256 "$scratch/$archive"; fi)
    [ "${found%% *}" = "$(sha256_of "$target")" ] ||
        fail "the file from $url has another checksum than uv $uv_version: nothing was installed. Run this again, or install uv in another way"
    tar -xzf "$scratch/$archive" -C "$scratch" || fail "can't unpack $archive: is the disk full?"
    mkdir -p "$own/uv"
    # moved into place at the end, so that there is never half of a uv
    if ! { cp "$scratch/uv-$target/uv" "$uv.new" && mv "$uv.new" "$uv"; }; then
        fail "can't write $uv: is the disk full?"
    fi
}

# Whether an address answers. Without curl and wget, this can't tell, and says yes.
answers() {
    if command -v curl >/dev/null; then
        curl --fail --silent --location --max-time 10 --output /dev/null "$1"
    elif command -v wget >/dev/null; then
        wget --quiet --tries=1 --timeout=10 --output-document=/dev/null "$1"
    fi
}

# Where there is 3.14 only, uv downloads an older Python. If it can't, 3.14 will do.
find_python() {
    if ! "$uv" python find "$python" >/dev/null 2>&1 && "$uv" python find 3.14 >/dev/null 2>&1 && ! run "$uv" python install "$python"; then
        echo "uv could not download an older Python, so Talkoot gets 3.14: nodes can't ask the router to forward a port"
        python=3.14
    fi
}

install_talkoot() {
    backend='--torch-backend auto'
    if ! answers "$torch_builds"; then
        echo "download.pytorch.org does not answer: torch comes from your package index, perhaps with CUDA (3 GB)"
        backend=''
    fi
    # this also repairs or updates an existing installation
    # shellcheck disable=SC2086  # two words or none
    run "$uv" tool install $backend --python "$python" --reinstall-package talkoot "$from" ||
        fail "uv could not install Talkoot: see its message above. Behind a proxy, set HTTPS_PROXY. Then run this again: it continues from here"
    [ "$dry_run" ] && return
    bin=$("$uv" tool dir --bin)
    "$bin/talkoot" --version || fail "$bin/talkoot does not run: please report what it says"
    case :$PATH: in
    *:"$bin":*) talkoot=talkoot ;;
    *)
        talkoot=$bin/talkoot
        echo "$bin is not in your PATH: \`$uv tool update-shell\` adds it."
        ;;
    esac
    echo "\`$talkoot doctor\` checks this machine, \`$talkoot update\` updates Talkoot, and \`$talkoot uninstall\` removes it."
}

offer_service() {
    if [ ! "$invite" ]; then
        [ "$dry_run" ] || echo "To host experts whenever you log in: \`$talkoot service install --join INVITE\`."
        return
    fi
    if [ ! "$service" ] && [ ! "$dry_run" ]; then
        # the script itself may come through standard input
        if ! { printf 'Host experts whenever you log in, starting now? [y/N] ' && read -r answer; } </dev/tty >/dev/tty 2>/dev/null; then
            answer=no
        fi
        case $answer in
        [yY]*) ;;
        *)
            echo "To do it later: \`$talkoot service install --join INVITE\`."
            return
            ;;
        esac
    fi
    if [ "$dry_run" ]; then
        run talkoot service install --join INVITE
    else
        "$bin/talkoot" service install --join "$invite" ||
            fail "Talkoot is installed, but its service is not: run \`talkoot service install\` again, or \`talkoot node\` by hand"
    fi
}

main "$@"
