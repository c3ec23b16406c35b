"""verify finds what is wrong; hub names are found; only whole directories are published; cards say what is known."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import hici
from adapter_models import make_base, make_trained
from golden_checkpoint import CHECKPOINT, EXPECTED, IDS, NEEDED, TOLERANCE
from helpers import difference, logits
from hici.adapters.card import base_licence, front_matter


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    root = tmp_path_factory.mktemp("ours")
    hici.save_pretrained(make_trained(make_base(root / "base")), root / "adapter", training={"steps": 2})
    return root / "adapter"


@pytest.fixture
def copy(ours, tmp_path):
    return shutil.copytree(ours, tmp_path / "copy")


def statuses(report):
    return {check.name: check.status for check in report.checks}


def problem(directory, **options):
    report = hici.verify(directory, **options)
    assert report.problems, report
    return " | ".join(f"{check.name}: {check.text}" for check in report.problems)


def edit_safe(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# verify


def test_whole_directories(ours, tmp_path):
    assert statuses(hici.verify(ours)) == {"files": "ok", "complete": "ok", "values": "ok", "rope": "ok", "base": "ok",
                                           "tokenizer": "not checked"}  # fmt: skip
    report = hici.verify(CHECKPOINT / "peft_fp32", **NEEDED)
    assert (report.kind, report.problems) == ("released", [])
    for kind in ("plain", "hici"):
        hici.merge(ours, tmp_path / kind, kind)
        report = hici.verify(tmp_path / kind)
        assert (report.kind, report.problems) == ({"plain": "plain", "hici": "merged"}[kind], [])


def test_what_cannot_be_checked_is_said(copy):
    record = json.loads((copy / "hici_config.json").read_text())
    (copy / "hici_config.json").write_text(json.dumps({**record, "base_model": "nobody/nothing"}))
    report = hici.verify(copy)
    assert statuses(report)["base"] == "not checked"
    assert not report.problems
    report = hici.verify(CHECKPOINT / "peft_fp32", config={"num_heads": 4})
    assert statuses(report)["rope"] == "not checked"
    assert statuses(report)["base"] == "not checked"
    assert "base: the base's config.json could not be read" in problem(copy, base_model="nobody/nothing")


NAME = "model.layers.1.self_attn.local_constructor.q_proj.weight"
SHARED = "self_attn.global_integrator.shared_compressor.0.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(NAME), "layers.1.self_attn.local_constructor.q_proj.weight: missing"),
        (lambda t: t.update({NAME: torch.zeros(3, 4)}), r"local_constructor.q_proj.weight.*shape"),
        (lambda t: t[NAME].fill_(float("nan")), f"values: .*NaN or infinity in 1 tensors .{NAME}"),
        (lambda t: t.update({f"model.layers.{i}.self_attn.local_constructor.x": torch.zeros(1) for i in (0, 1)}),
         "local_constructor.x is left over"),
        (lambda t: [t.pop(f"model.layers.{i}.self_attn.global_integrator.expand.weight") for i in (0, 1)],
         "expand.weight is missing in every layer"),
        (lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name], "layers.0.self_attn.* missing"),
    ],
    ids=["missing", "shape", "nan", "left over", "everywhere", "a layer"],
)  # fmt: skip
def test_faults_are_found_without_the_base(copy, change, match):
    record = json.loads((copy / "hici_config.json").read_text())
    (copy / "hici_config.json").write_text(json.dumps({**record, "base_model": "nobody/nothing"}))
    edit_safe(copy / "hici_model.safetensors", change)
    import re

    assert re.search(match, problem(copy)), problem(copy)


def test_faults_of_files_configs_and_bases(copy, tmp_path):
    lora = copy / "adapter_model.safetensors"
    edit_safe(lora, lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    assert "q_proj.lora_B.weight: missing" in problem(copy)
    lora.write_bytes(lora.read_bytes()[:-50])
    assert "adapter_model.safetensors is damaged" in problem(copy)
    lora.unlink()
    assert "files: " in problem(copy)
    assert "lacks adapter_model.safetensors" in problem(copy)
    other = make_base(tmp_path / "qwen3", "qwen3")
    assert "base: " in problem(CHECKPOINT / "peft_fp32", **{**NEEDED, "base_model": other})
    with pytest.raises(ValueError, match="holds no model; check the path"):
        hici.verify(tmp_path)


def test_a_rope_that_contradicts_itself(copy):
    record = json.loads((copy / "hici_config.json").read_text())
    (copy / "hici_config.json").write_text(json.dumps({**record, "context_length": 4096}))
    assert "context_length=4096 is more than max_position_embeddings=64" in problem(copy)


def test_the_tokenizer_must_fit_the_embeddings(copy):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    for extra, status in ((0, "ok"), (3, "problem")):
        vocabulary = {**words, **{f"x{i}": 97 + i for i in range(extra)}}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(copy)
        assert statuses(hici.verify(copy))["tokenizer"] == status
    assert "the tokenizer has 100 entries, but the embeddings have 97 rows" in problem(copy)
    (copy / "tokenizer.json").write_text("<html>")
    assert "tokenizer: its files cannot be read" in problem(copy)


def test_faults_of_a_merged_model(ours, tmp_path):
    hici.merge(ours, tmp_path / "m", "hici")
    file = tmp_path / "m" / "model.safetensors"
    good = load_file(file)
    edit_safe(file, lambda t: t.pop(NAME))
    assert f"complete: 1 weights missing or of another shape: {NAME}" in problem(tmp_path / "m")
    save_file({**good, NAME: good[NAME] * float("inf")}, file, metadata={"format": "pt"})
    assert "values: NaN or infinity in 1 tensors" in problem(tmp_path / "m")
    file.write_bytes(b"<!DOCTYPE html>")
    assert "is a web page and no weights" in problem(tmp_path / "m")


# hub


@pytest.fixture
def hub(monkeypatch):
    """snapshot_download gives the golden adapter for one name; calls are recorded."""
    calls = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, allow_patterns))
        if repo_id != "someone/Tiny-HiCI-1k":
            raise LocalEntryNotFoundError("outgoing traffic is disabled")
        return str(CHECKPOINT / "peft_fp32")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_name_is_downloaded_and_tells_the_context(hub):
    model = hici.from_pretrained("someone/Tiny-HiCI-1k", NEEDED["base_model"], config={"num_heads": 4}, revision="v2")
    assert model.config.max_position_embeddings == 1024
    assert hub[0][:2] == ("someone/Tiny-HiCI-1k", "v2")
    assert {"*.safetensors", "*.bin", "*.json"} <= set(hub[0][2])


def test_names_that_are_not_there(hub, tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing is not a directory here, not in the hub's cache.*OFFLINE"):
        hici.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"/no/such/place does not exist, so it is not a directory"):
        hici.from_pretrained("/no/such/place")
    with pytest.raises(ValueError, match="revision='v2' with .*, which is a directory on this machine"):
        hici.from_pretrained(CHECKPOINT / "peft_fp32", revision="v2")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, so it is not a directory"):
        hici.from_pretrained(tmp_path / "file")


def test_the_real_cache_is_used_offline(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--Tiny-HiCI-1k"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(CHECKPOINT / "peft_fp32", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = hici.from_pretrained("someone/Tiny-HiCI-1k", NEEDED["base_model"], config={"num_heads": 4})
    assert model.config.max_position_embeddings == 1024
    again = hici.from_pretrained(snapshot, **NEEDED)
    assert difference(logits(again, IDS), EXPECTED["peft_fp32/full/logits"]) < TOLERANCE


def test_only_whole_directories_are_published(copy, monkeypatch):
    done = []

    class Api:
        def __init__(self, token=None):
            done.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            done.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, **options):
            done.append(("upload", options["repo_id"], options["folder_path"], options["revision"]))
            return "committed"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hici.push_to_hub(copy, "me/mine", private=True, revision="dev", token="t") == "committed"
    assert done == [("token", "t"), ("create", "me/mine", True, True), ("upload", "me/mine", copy, "dev")]
    done.clear()
    edit_safe(copy / "hici_model.safetensors", lambda t: t.pop(NAME))
    with pytest.raises(ValueError, match="is not published, since it is not whole: .*missing"):
        hici.push_to_hub(copy, "me/mine")
    assert not done


# cards


def test_cards_say_what_is_known(ours, tmp_path):
    base = json.loads((ours / "hici_config.json").read_text())["base_model"]
    from pathlib import Path

    readme = Path(base) / "README.md"
    readme.write_text("---\nlicense: llama2\nlanguage: en\n---\n# Base\n")
    assert base_licence(base) == "llama2"
    hici.merge(ours, tmp_path / "plain")
    hici.merge(ours, tmp_path / "hici", "hici")
    hici.convert(ours, tmp_path / "released", "released")
    for name in ("plain", "hici", "released"):
        card = (tmp_path / name / "README.md").read_text()
        front = front_matter(tmp_path / name / "README.md")
        assert front["license"] == "llama2"
        assert "hici" in front["tags"] or name == "plain"
        assert "`llama2`, holds for this too" in card
        assert "64 tokens" in card
        assert '"factor": 2.0' in card
        assert "| steps | 2 |" in card
        assert ("trust_remote_code=True" in card) == (name == "hici")
        assert ("hici.from_pretrained" in card) == (name == "released")
    readme.unlink()
    assert base_licence(base) is None
    assert base_licence("nobody/nothing") is None


@pytest.mark.parametrize("text", ["", "no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_front_matter_that_is_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == {}
