#!/usr/bin/env bash
# Every check and measurement that needs a GPU, in one call of under eight minutes. Results: FOLDER/gpu_check.json.
#
#   scripts/gpu_check.sh [--out FOLDER] [--section NAME]... [--toy]
#
# Needs a Python with torch, triton and transformers (PYTHON, default python3), and these packages besides: msgspec,
# llguidance, rich, jinja2, numpy, safetensors, tokenizers, sentencepiece. Nothing is installed and nothing fetched. On a
# machine without network what is missing (most likely msgspec and llguidance) is carried in a folder .gpu-site beside
# scripts/, filled elsewhere for that machine's Python, here 3.12:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     -d .gpu-wheels msgspec llguidance
#   python3 -m pip install --no-deps --no-index --target .gpu-site .gpu-wheels/*.whl
#
# Exit code: 0 all well, 1 something failed or was cut off (what was measured is written all the same), 2 no GPU.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python="${PYTHON:-python3}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ -d "$root/.gpu-site" ] && PYTHONPATH="$PYTHONPATH:$root/.gpu-site"
INFERFLUX_COMMIT="$(git rev-parse --short HEAD 2>/dev/null || true)"
export INFERFLUX_COMMIT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
missing="$("$python" - <<'PY'
from importlib.util import find_spec
names = ("torch", "triton", "transformers", "msgspec", "llguidance", "rich", "jinja2", "numpy", "safetensors", "tokenizers")
print(" ".join(name for name in names if find_spec(name) is None))
PY
)"
if [ -n "$missing" ]; then
  echo "gpu_check: $python lacks: $missing (see the top of scripts/gpu_check.sh)" >&2
  exit 2
fi
exec "$python" -m benchmarks.gpu.check "$@"
