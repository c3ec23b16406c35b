"""The registry: names, errors, and adding a backend or an architecture by adding one file."""

import importlib
import sys

import pytest

import hici.attention
import hici.models.architectures
from hici.attention import Backend, backends, get_backend
from hici.models.architectures import architectures, get_architecture


def test_known():
    assert {"reference", "sdpa"} <= set(backends())
    assert all(name == backend.name for name, backend in backends().items())
    assert not get_backend("reference").absorbed
    assert get_backend("sdpa").absorbed


def test_auto_takes_the_best_that_is_available(monkeypatch):
    assert get_backend("auto") is max((b for b in backends().values() if b.available()), key=lambda b: b.priority)
    only_sdpa = {name: backends()[name] for name in ("reference", "sdpa")}
    monkeypatch.setattr(hici.attention, "backends", lambda: only_sdpa)
    assert get_backend("auto").name == "sdpa"
    absent = Backend("absent", lambda: None, absorbed=True, priority=99, available=lambda: False)
    monkeypatch.setattr(hici.attention, "backends", lambda: {**only_sdpa, "absent": absent})
    assert get_backend("auto").name == "sdpa"
    message = "^attention backend 'absent' does not run on this machine; use backend='auto', which takes one that does$"
    with pytest.raises(ValueError, match=message):
        get_backend("absent")


def test_unknown_backend_names_the_nearest():
    message = r"^unknown attention backend 'sdpaa'; known: auto, .*reference, .*sdpa.*\. Did you mean 'sdpa'\?$"
    with pytest.raises(ValueError, match=message):
        get_backend("sdpaa")


@pytest.fixture
def add_module(monkeypatch, tmp_path):
    """Puts one new file into a package, as if it had been written there; takes it away again."""
    added = []

    def add(package, name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        importlib.invalidate_caches()
        added.append((package, name))

    yield add
    for package, name in added:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_one_new_file_is_a_new_backend(add_module):
    text = """
        from hici.attention import Backend
        BACKEND = Backend("mine", lambda *a, **k: None, absorbed=True, priority=1000)
    """
    add_module(hici.attention, "zz_extra_backend", "\n".join(line.strip() for line in text.splitlines()))
    assert get_backend("mine").name == "mine"
    assert get_backend("auto").name == "mine"


def test_one_new_file_is_a_new_architecture(add_module):
    text = 'from hici.models.architectures.base import Architecture\nARCHITECTURE = Architecture(("brandnew",))\n'
    add_module(hici.models.architectures, "zz_extra_architecture", text)
    assert get_architecture("brandnew") is architectures()["brandnew"]


def test_the_test_module_is_gone():
    assert "mine" not in backends()
    assert "brandnew" not in architectures()
