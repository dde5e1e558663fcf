#!/bin/sh
# The container's first process: makes a key where none is configured, then becomes `inferflux`.
#
# The server refuses to answer beyond loopback without a key or an identity provider. So that the first
# `docker run` answers all the same, a key is made, kept beside the policy store, and shown in the log this once.
set -eu

state="${INFERFLUX_STATE:-/var/lib/inferflux}"
config="${INFERFLUX_DEFAULT_CONFIG:-/etc/inferflux/server.yaml}"
key_file="$state/first-api-key"

# has_credentials: false when the environment and the configuration, read as the server reads them, let nobody call. A
# key made all the same would take the place of theirs. What cannot be read at all the server will say.
has_credentials() {
  python - "$config" 2>/dev/null <<'PYTHON' || [ $? -ne 3 ]
import pathlib, sys
from inferflux.config.from_process import load_from_process

auth = load_from_process(pathlib.Path(sys.argv[1]), {}).config.auth
sys.exit(0 if auth.api_keys or auth.oidc_issuer or auth.allow_anonymous else 3)
PYTHON
}

if [ "${1:-}" = serve ] && [ "$*" = "serve --config $config" ] && ! has_credentials; then
  if [ ! -s "$key_file" ]; then
    key="$(python -c 'import secrets; print("sk-" + secrets.token_urlsafe(32))')"
    (umask 077 && printf '%s\n' "$key" >"$key_file")
    printf '%s\n' "No API key is configured; made one for this container: $key" \
      "It is kept in $key_file. Set INFERFLUX_API_KEYS or mount a configuration to use keys of your own." >&2
  fi
  INFERFLUX_API_KEYS="$(cat "$key_file"):generate+read+admin"
  export INFERFLUX_API_KEYS
fi

exec inferflux "$@"
