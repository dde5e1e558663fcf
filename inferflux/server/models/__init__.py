"""The served models: which are wanted, how they change at run time, the file that lists them, and their events.

`models` puts the parts together; `control` changes what is served; `wanted` merges configuration, registry and admin
API; `registry` follows the file; `events` remembers, logs and counts. Knows engines by their backends; no HTTP.
"""
