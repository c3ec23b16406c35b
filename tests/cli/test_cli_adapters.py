"""`hici convert`, `verify` and `merge`, and the other verbs on released and merged directories."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hici
from golden_checkpoint import CHECKPOINT
from helpers import difference, logits, random_ids

ADAPTER, BASE = CHECKPOINT / "peft_fp32", CHECKPOINT / "base"
FLAGS = ["--base-model", BASE, "--context-length", 64, "--num-heads", 4]


def test_convert_there_and_back(hici_command, tmp_path):
    done = hici_command("convert", ADAPTER, tmp_path / "ours", "--to", "hici", *FLAGS)
    assert done.status == 0, done.err
    assert "read back and compared bit for bit" in done.out
    done = hici_command("convert", tmp_path / "ours", tmp_path / "back", "--to", "released")
    assert done.status == 0, done.err
    before, after = (torch.load(d / "trainable_params.bin", weights_only=True) for d in (ADAPTER, tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    done = hici_command("convert", tmp_path / "ours", tmp_path / "back", "--to", "released")
    assert done.status == 2
    assert "not empty" in done.err
    assert hici_command("convert", tmp_path / "ours", tmp_path / "back", "--to", "released", "--overwrite").status == 0


@pytest.mark.parametrize("kind", ["plain", "hici"])
def test_merge(hici_command, adapter_directory, tmp_path, kind):
    done = hici_command("merge", adapter_directory, tmp_path / "out", "--as", kind)
    assert done.status == 0, done.err
    assert f"merged as {kind}" in done.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    adapter = hici.from_pretrained(adapter_directory, attention="full" if kind == "plain" else "hici")
    assert difference(logits(model, random_ids(2, 40)), logits(adapter, random_ids(2, 40))) < 1e-5
    assert "exists and is not empty" in hici_command("merge", adapter_directory, tmp_path / "out", "--as", kind).err
    done = hici_command(
        "merge", adapter_directory, tmp_path / "out", "--as", kind, "--overwrite", "--dtype", "bfloat16"
    )
    assert done.status == 0, done.err
    assert hici_command("verify", tmp_path / "out").status == 0


def test_verify(hici_command, adapter_directory, tmp_path):
    done = hici_command("verify", adapter_directory)
    assert done.status == 0, done.err
    assert "no problem found" in done.out
    done = hici_command("verify", ADAPTER, *FLAGS, "--json")
    report = json.loads(done.out)
    assert (done.status, report["kind"], report["problems"]) == (0, "released", 0)
    assert report["made_with"]["hici"]
    torch.save({}, tmp_path / "trainable_params.bin")
    done = hici_command("verify", tmp_path)
    assert done.status == 1
    assert "lacks adapter_config.json" in done.out
    assert hici_command("verify", tmp_path / "nothing").status == 2


def test_info_of_released_and_merged_directories(hici_command, tmp_path):
    facts = json.loads(hici_command("info", ADAPTER, *FLAGS, "--json").out)
    assert facts["directory"]["layout"] == "released"
    assert facts["directory"]["context_length"] == 64
    assert facts["hici_parameters"] == facts["directory"]["parameters"]["HiCI modules"] == 33218
    assert facts["rope"].startswith("64 positions")
    done = hici_command("info", ADAPTER, "--base-model", BASE)
    assert done.status == 2
    assert "does not tell the context" in done.err
    hici_command("merge", ADAPTER, tmp_path / "m", "--as", "hici", *FLAGS)
    facts = json.loads(hici_command("info", tmp_path / "m", "--json").out)
    assert facts["hici"]["num_heads"] == 4


def test_generate_wants_a_tokenizer(hici_command):
    done = hici_command("generate", ADAPTER, *FLAGS, "--prompt", "x")
    assert done.status == 2
    assert "the tokenizer of" in done.err
    assert "put the tokenizer's files beside the model" in done.err


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_generate_and_eval_on_every_kind_of_directory(hici_command, adapter_directory, text_file, tmp_path, attention):
    hici_command("convert", adapter_directory, tmp_path / "released", "--to", "released")
    hici_command("merge", adapter_directory, tmp_path / "merged", "--as", "hici")
    texts, losses = [], []
    for directory, kind in ((adapter_directory, "adapter"), (tmp_path / "released", "adapter"),
                            (tmp_path / "merged", "merged")):  # fmt: skip
        done = hici_command(
            "generate", directory, "--prompt", "the cat", "--max-new-tokens", 8, "--attention", attention
        )
        assert done.status == 0, done.err
        texts.append(done.out)
        target = tmp_path / f"{kind}.json"
        done = hici_command("eval", "ppl", directory, "--data", text_file, "--context", 64, "--attention", attention,
                            "--out", target)  # fmt: skip
        assert done.status == 0, done.err
        record = json.loads(target.read_text())
        assert record["model"]["kind"] == kind
        losses.append(record["conditions"][0]["mean_loss"])
        target.unlink()
        target.with_suffix(".png").unlink()
    assert len(set(texts)) == 1
    assert max(losses) - min(losses) < 1e-4


def test_flags_of_adapters_on_a_plain_model(hici_command, base_directory):
    for flag in ("--context-length", "--num-heads"):
        done = hici_command("generate", base_directory, "--prompt", "x", flag, 4)
        assert done.status == 2
        assert f"{flag} 4 is for an adapter" in done.err
