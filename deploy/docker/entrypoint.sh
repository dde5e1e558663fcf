#!/bin/sh
# The container's first process: makes a key where none is configured, then becomes `inferflux`.
#
# The server refuses to answer beyond loopback without a key or an identity provider. So that the first
# `docker run` answers all the same, a key is made, kept beside the policy store, and shown in the log this once.
set -eu

state="${INFERFLUX_STATE:-/var/lib/inferflux}"
config="${INFERFLUX_DEFAULT_CONFIG:-/etc/inferflux/server.yaml}"
key_file="$state/first-api-key"

# has_credentials: true when the environment or the mounted configuration says who may call. Elements of the list count
# too (INFERFLUX_AUTH__API_KEYS__0__KEY): they would be laid over the key made here, and so get its scopes.
has_credentials() {
  env | grep -Eq '^INFERFLUX_(API_KEYS|AUTH__API_KEYS(__[0-9]+__[A-Z0-9_]+)?|OIDC_ISSUER|AUTH__OIDC_ISSUER)=.' ||
    grep -Eq '^[[:space:]]*(api_keys|oidc_issuer|allow_anonymous):' "$config"
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
