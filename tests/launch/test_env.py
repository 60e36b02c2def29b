"""launch/env.sh: pip's settings for uv; what is run before a commit; the version."""

from __future__ import annotations

import importlib.util
import re

import pytest
import yaml
from places import ROOT

import tlx


@pytest.fixture(scope="module")
def pip_for_uv():
    spec = importlib.util.spec_from_file_location("pip_for_uv", ROOT / "launch" / "pip_for_uv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_installs_from_where_pip_would(pip_for_uv):
    """Variables win over files; an empty list is no setting, and what uv is told already stays."""
    mirror = "global.index-url='http://old'\nglobal.cert='/c.pem'\n:env:.index-url='http://new'\n:env:.timeout='9'\n"
    found = {"UV_DEFAULT_INDEX": "http://new", "SSL_CERT_FILE": "/c.pem", "UV_HTTP_TIMEOUT": "9"}
    assert pip_for_uv.variables(mirror, {}) == found
    assert pip_for_uv.variables(mirror, {"UV_INDEX_URL": "mine"}).keys() == found.keys() - {"UV_DEFAULT_INDEX"}
    offline = "global.find-links='\\n/a\\n/b'\ninstall.no-index='true'\nlist.format='json'\nglobal.retries='2'\n"
    best = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    assert pip_for_uv.variables(offline, {}) == {"UV_FIND_LINKS": "/a,/b", "UV_NO_INDEX": "1", **best}
    assert pip_for_uv.variables("", {}) == {}


def test_what_pip_and_uv_write_differently(pip_for_uv, monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    said = "global.timeout='15.5'\nglobal.cert='~/c.pem'\n:env:.config-file='/etc/x'\n"
    assert pip_for_uv.variables(said, {}) == {"UV_HTTP_TIMEOUT": "16", "SSL_CERT_FILE": "/home/a/c.pem"}


def test_a_setting_that_uv_has_not_leaves_it_to_pip(pip_for_uv):
    with pytest.raises(LookupError, match="platform"):
        pip_for_uv.variables("global.platform='linux'\n", {})


def test_before_a_commit_runs_what_the_tests_run_first():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/python ") for hook in repository["hooks"]]
    first = re.findall(r"^\$python (-m .*)$", (ROOT / "launch" / "test.sh").read_text(), flags=re.MULTILINE)
    assert (repository["repo"], hooks) == ("local", first)


def test_one_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[versions[0] == "Unreleased"] == tlx.__version__
    assert not re.search(r'^version *= *"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
