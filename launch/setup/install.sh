# usage: install.sh VENV_BIN ARGS...
# `uv pip install ARGS` with bytecode compiled (else every process of a run compiles torch and vLLM at import).
# uv does not read pip's settings, so pip's find-links, where set, are passed on.
set -eu
bin=$1
shift
if [ -z "${UV_FIND_LINKS:-}" ]; then
    links=${PIP_FIND_LINKS:-$("$bin/python" -m pip config get global.find-links 2>/dev/null || true)}
    if [ -n "$links" ]; then
        export UV_FIND_LINKS="$links"
    fi
fi
exec "$bin/uv" pip install --python "$bin/python" --compile-bytecode "$@"
