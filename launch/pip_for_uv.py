"""pip's settings, from its files and variables, as the variables that tell uv the same.

pip config list | python launch/pip_for_uv.py      # prints lines for a shell; fails where uv has no such setting
"""

import ast
import math
import os
import shlex
import sys

SECTIONS = ("global", "install", ":env:")  # the later wins
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
}
OLDER = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
FILES = ("SSL_CERT_FILE", "SSL_CLIENT_CERT")
LISTS = {"UV_FIND_LINKS": ","}  # pip separates by spaces, and so does uv, but here
NO_MATTER = {
    *(
        "break-system-packages",
        "cache-dir",
        "config-file",  # whose settings are listed, too
        "disable-pip-version-check",
        "log",
        "no-cache-dir",
        "no-color",
        "no-compile",
    ),
    *("no-input", "no-warn-script-location", "prefer-binary", "progress-bar", "quiet", "require-virtualenv", "retries"),
    *("root-user-action", "use-feature", "verbose"),
}


def variables(listed: str, own: dict[str, str]) -> dict[str, str]:
    """What to set.

    Args:
        listed: what `pip config list` prints.
        own: the environment; what it tells uv already stays.

    Raises:
        LookupError: a setting that uv does not have.
    """
    said = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in said:
            said[section][name] = str(ast.literal_eval(value)).strip()
    found = {}
    for name, value in {name: value for section in SECTIONS for name, value in said[section].items()}.items():
        if name == "no-index" and value.lower() in ("0", "false", "no", "off"):
            continue
        if name == "no-index":
            found["UV_NO_INDEX"] = "1"
        elif name in NAMES:
            variable = NAMES[name]
            found[variable] = LISTS.get(variable, " ").join(value.split())
            if variable in FILES:
                found[variable] = os.path.expanduser(value)
            elif variable == "UV_HTTP_TIMEOUT":
                found[variable] = str(math.ceil(float(value)))  # uv takes whole seconds
        elif name not in NO_MATTER:
            raise LookupError(name)
    if found.keys() & {"UV_INDEX", "UV_FIND_LINKS"}:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's: the newest that any of them has
    return {name: value for name, value in found.items() if name not in own and OLDER.get(name, name) not in own}


if __name__ == "__main__":
    try:
        for name, value in variables(sys.stdin.read(), dict(os.environ)).items():
            print(f"export {name}={shlex.quote(value)}")
    except (LookupError, SyntaxError, ValueError) as error:
        sys.exit(f"environment: uv has no setting like pip's {error.args[0]}; pip installs")
