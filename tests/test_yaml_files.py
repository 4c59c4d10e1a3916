"""What is no sound YAML is one clear error, soon, at little memory."""

import resource
import time

import pytest
import yaml

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.yaml_files import MAX_VALUES, compose, load, read_text

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
CYCLE = "data: &d\n  table: t.csv\n  again: *d\n"
DEEP = "data: " + "[" * 20_000 + "]" * 20_000
BAD = {
    "laughs.yaml": (LAUGHS.encode(), "its anchors (&) stand for more than"),
    "cycle.yaml": (CYCLE.encode(), "an anchor (&) that holds itself"),
    "deep.yaml": (DEEP.encode(), "nested too deeply"),
    "utf16.yaml": ("data: {table: t.csv}".encode("utf-16"), "no text in UTF-8"),
    "binary.yaml": (bytes(range(256)) * 9, "no text in UTF-8"),
    "nul.yaml": (b"data: {table: \0}", "not YAML"),
    "large.yaml": (b"# " + b"x" * (1 << 22), "bytes, and is no config"),
    "python.yaml": (b"data: !!python/object/apply:os.system ['touch hacked']", "not YAML"),
    "number.yaml": (b"data: {table: !!int x}", "not YAML"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("verb", ["index", "fit"])
def test_it_is_refused_by_name_at_once(name, verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, says = BAD[name]
    (tmp_path / name).write_bytes(data)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main([verb, "--config", name]) == 2
    said = capsys.readouterr().err
    assert f"{name}: " in said
    assert says in " ".join(said.split())
    assert len(said.splitlines()) <= 6
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB; torch
    assert not (tmp_path / "hacked").exists()


def test_sound_yaml_is_what_the_library_reads(tmp_path):
    text = "a: &x {b: 1, c: [1.5, null, true]}\nd: *x\ne: {<<: *x, f: 2020-01-01}\n# é\n"
    assert load(text, "here") == yaml.safe_load(text)
    assert load("", "here") is None
    assert compose("# nothing", "here") is None
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_text(path) == text
    many = "[" + "x, " * (MAX_VALUES - 2) + "]"
    assert len(load(many, "here")) == MAX_VALUES - 2
    with pytest.raises(SettingsError, match="here: its anchors"):
        load(f"[{many}, {many}]", "here")
