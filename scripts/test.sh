#!/usr/bin/env bash
# Everything that must hold before a change goes in: lint, types, import contracts, tests.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
cd "$root"

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'TEXT'
usage: scripts/test.sh [pytest arguments]

Without arguments: ruff, mypy, import contracts, then every test on two workers. With arguments: pytest alone, with
these. Makes .venv and installs the development tools first where that is needed.
TEXT
  exit 0
fi

failed=()

# stage NAME COMMAND...: runs one check, goes on after a failure.
stage() {
  local name="$1" start=$SECONDS
  shift
  say "== $name"
  "$@" || failed+=("$name")
  say "== $name: $((SECONDS - start)) s"
}

ensure_environment dev
"$root/scripts/test-tools.sh"
export PATH="$venv/bin:$PATH"
# One thread per worker: the models under test are tiny, and threads of two workers only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ $# -gt 0 ]; then
  exec "$venv/bin/python" -m pytest "$@"
fi

stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contracts" lint-imports
stage "pytest" "$venv/bin/python" -m pytest -n 2 --durations 15

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]}"
  exit 1
fi
say "All passed."
