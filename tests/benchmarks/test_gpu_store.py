"""What counts as done when the command for GPUs is started again."""

from benchmarks.gpu.store import Store, fingerprint


def test_what_was_written_is_read_for_the_same_key_only(tmp_path):
    Store(tmp_path, "a").write("case scan gae 3x5", {"contests": [1]})
    assert Store(tmp_path, "a").read("case scan gae 3x5") == {"contests": [1]}
    assert Store(tmp_path, "b").read("case scan gae 3x5") is None
    assert Store(tmp_path, "a").read("case scan gae 3x6") is None


def test_names_that_differ_in_signs_alone_are_apart(tmp_path):
    store = Store(tmp_path, "a")
    store.write("x y", {"n": 1})
    store.write("x/y", {"n": 2})
    assert (store.read("x y"), store.read("x/y")) == ({"n": 1}, {"n": 2})


def test_half_a_file_counts_as_not_done(tmp_path):
    store = Store(tmp_path, "a")
    store.write("x", {})
    store.path("x").write_text('{"key": "a", "outc')
    assert store.read("x") is None


def test_forget(tmp_path):
    store = Store(tmp_path, "a")
    store.write("x", {})
    store.forget()
    assert store.read("x") is None


def test_fingerprint_tells_sources_names_and_facts_apart(tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "scan.cu"
    source.write_text("one")
    before = fingerprint("H200", root=tmp_path)
    assert fingerprint("H200", root=tmp_path) == before != fingerprint("H100", root=tmp_path)
    (tmp_path / "csrc" / "notes.log").write_text("no source")
    assert fingerprint("H200", root=tmp_path) == before
    source.write_text("two")
    assert fingerprint("H200", root=tmp_path) != before
    source.write_text("one")
    source.rename(tmp_path / "csrc" / "scans.cu")
    assert fingerprint("H200", root=tmp_path) != before
