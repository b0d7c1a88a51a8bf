"""What a run or a result was computed with is told, wherever it can be known."""

from __future__ import annotations

import os
import subprocess

from parl_core import provenance


def test_the_processor_is_named_wherever_it_can_be(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(provenance, "_CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert provenance.describe_environment()["cpu"] == "aarch64"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert provenance.describe_environment()["cpu"] == "aarch64"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 2 GHz\nmodel name\t: Other\n")
    assert provenance.describe_environment()["cpu"] == "Fast CPU @ 2 GHz"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    sysctl = tmp_path / "bin" / "sysctl"
    sysctl.parent.mkdir()
    sysctl.write_text('#!/bin/sh\ntest "$*" = "-n machdep.cpu.brand_string" && echo "Apple M9"\n')
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sysctl.parent}:{os.environ['PATH']}")
    assert provenance.describe_environment()["cpu"] == "Apple M9"


def test_the_commit_is_that_of_the_packages_own_clone(tmp_path, monkeypatch):
    def git(*arguments):
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
        return subprocess.run(["git", *options, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "parl_core"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "other").write_text("")
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "another project")
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    assert provenance.describe_environment()["commit"] is None  # merely installed there
    assert provenance.describe_environment()["dirty"] is None
    git("add", ".")
    git("commit", "-qm", "ours")
    facts = provenance.describe_environment()
    assert (facts["commit"], facts["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "results").write_text("")
    assert provenance.describe_environment()["dirty"] is False  # no code
    (package / "new.py").write_text("")
    assert provenance.describe_environment()["dirty"] is True
