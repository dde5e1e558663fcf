# Shared by the scripts: finds Python, makes .venv and keeps it in step with pyproject.toml and constraints.txt.
# Sourced, not run. Needs $root, the repository's folder.

venv="$root/.venv"

say() {
  printf '%s\n' "$*" >&2
}

# Prints a Python that is new enough and can make virtual environments.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    # Run it rather than look for it: version managers put names on the path that fail when called.
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say "InferFlux needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: python3-venv)."
  say "Set PYTHON=/path/to/python to name one."
  return 1
}

# Changes whenever the environment may be out of date: what is installed, or where it stands (scripts hold its path).
environment_hash() {
  { printf '%s\n' "$root"; cat "$root/pyproject.toml" "${INFERFLUX_CONSTRAINTS:-$root/constraints.txt}"; } | cksum
}

# is_installed PROFILE HASH: true when .venv holds what this PROFILE (run or dev) needs.
is_installed() {
  [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$2" ]
}

# ensure_environment PROFILE: makes .venv if needed and installs the package: `run` as it is, `dev` with its tools.
ensure_environment() {
  local hash
  hash="$(environment_hash)"
  is_installed "$1" "$hash" && return
  (
    # Two starts at once: the second waits, then finds the work done. Released when this subshell ends.
    if command -v flock >/dev/null; then
      exec 9<"$root/pyproject.toml"
      flock 9
    fi
    is_installed "$1" "$hash" || install_environment "$1" "$hash"
  )
}

install_environment() {
  local python package="$root"
  if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    python="$(find_python)"
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  [ "$1" = dev ] && package="$root[dev]"
  say "Installing into $venv (the first time takes a few minutes)"
  rm -f "$venv"/.installed-*
  "$venv/bin/python" -m pip install --disable-pip-version-check \
    --constraint "${INFERFLUX_CONSTRAINTS:-$root/constraints.txt}" --editable "$package" >&2
  # A few seconds where there is a compiler; where there is none, torch's kernels serve.
  "$venv/bin/inferflux" kernels build >&2 || true
  printf '%s\n' "$2" >"$venv/.installed-run"
  [ "$1" = run ] || printf '%s\n' "$2" >"$venv/.installed-$1"
}
