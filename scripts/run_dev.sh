#!/usr/bin/env bash
# Starts a development server on 127.0.0.1:8080; makes and fills .venv first where that is needed.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

case " $* " in
  *" --help "* | *" -h "*)
    cat <<'TEXT'
usage: scripts/run_dev.sh [--config FILE] [--port N] [--host H]

Starts `inferflux serve` with these arguments (default: --config config/server.yaml of this repository). The first
start makes .venv and installs the package with the versions of constraints.txt; later ones start at once.

environment:
  PYTHON                 Python 3.11 or newer to make .venv with
  INFERFLUX_CONSTRAINTS  another constraints file
TEXT
    exit 0
    ;;
  *" --config"[\ =]*) ;;
  *) set -- --config "$root/config/server.yaml" "$@" ;;
esac

ensure_environment run
exec "$venv/bin/inferflux" serve "$@"
