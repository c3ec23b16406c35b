"""The wheel, installed without its dependencies into an empty environment, shows its help."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_wheel_holds_the_package_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hici/py.typed", "hici/presets/llama-2-7b.json", "hici/cli/eval_ppl.py"} <= set(names)
    assert {"hici/eval/longbench/datasets.json", "hici/eval/longbench/NOTICE"} <= set(names)
    assert {"hici/report/page.css", "hici/report/page.html.jinja"} <= set(names)
    dropin = {"llama_attn_hici.py", "qwen3_attn_hici.py"}  # the published names, at the top
    assert dropin <= set(names)
    assert all(name.startswith(("hici/", "hici-")) for name in set(names) - dropin)


def test_help_in_an_empty_environment(wheel, tmp_path):
    assert run(sys.executable, "-m", "venv", str(tmp_path / "env")).returncode == 0
    install = run(str(tmp_path / "env/bin/pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    assert install.returncode == 0, install.stderr
    verbs = ("", "train", "eval ppl", "eval all", "eval retrieval", "inspect", "score longbench", "report", "generate")
    for words in (verb.split() for verb in verbs):
        done = run(str(tmp_path / "env/bin/hici"), *words, "--help")
        assert done.returncode == 0, done.stderr
        assert "examples:" in done.stdout
