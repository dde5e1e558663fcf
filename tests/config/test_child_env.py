"""The engine's process is given no secret."""

from inferflux.config.child_env import without_secrets


def test_secrets_stay_here_and_the_rest_goes_along() -> None:
    kept = {"PATH": "/bin", "RANK": "0", "INFERFLUX_RUNTIME__DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    secret = {
        "INFERFLUX_API_KEYS": "k:admin",
        "INFERFLUX_AUTH__API_KEYS": '[{"key": "k"}]',
        "INFERFLUX_AUTH__API_KEYS__0__KEY": "k",
        "INFERFLUX_POLICY_PASSPHRASE": "p",
        "INFERCTL_API_KEY": "k",
    }
    assert without_secrets(kept | secret) == kept
