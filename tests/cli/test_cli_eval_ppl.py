"""`hici eval ppl` from files to JSON, and its refusals."""

import hashlib
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hici
from hici.data.stream import load_stream


@pytest.fixture(scope="module")
def stream(tokenizer, text_file):
    """The text, then EOS."""
    return load_stream(text_file, tokenizer, vocab_size=len(tokenizer))[0]


@torch.no_grad()
def naive_loss(model, stream, context):
    """Protocol strict on one document: EOS in front, as the tokenizer has no BOS."""
    document, losses = stream[:-1], []
    text = np.append(stream[-1:], document)
    for first in range(1, len(text), context):
        last = min(first + context, len(text))
        ids = torch.from_numpy(text[max(0, last - 1 - context) : last])
        logits = model(ids[None, :-1]).logits[0].double()[-(last - first) :]
        losses += F.cross_entropy(logits, ids[-(last - first) :], reduction="none").tolist()
    assert len(losses) == len(document)
    return np.mean(losses)


def test_several_attentions_and_lengths(adapter_directory, text_file, stream, tmp_path, hici_command):
    out = tmp_path / "results"
    done = hici_command("eval", "ppl", adapter_directory, "--data", text_file, "--context", 32, 64,
                        "--attention", "full", "hici", "hici_s2", "--out", out)  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((out / "ppl-strict.json").read_text())
    assert (out / "ppl-strict.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["context"], r["attention"]) for r in record["conditions"]] == [
        (context, attention) for context in (32, 64) for attention in ("full", "hici", "hici_s2")
    ]
    for r in record["conditions"]:
        model = hici.from_pretrained(adapter_directory)
        model.get_base_model().set_attn_implementation("sdpa" if r["attention"] == "full" else r["attention"])
        assert r["mean_loss"] == pytest.approx(naive_loss(model, stream, r["context"]), abs=1e-5)
        assert f"{r['ppl']:.3f}" in done.out
        assert len(r["losses"]) == -(-(len(stream) - 1) // r["context"])
    assert len({round(r["mean_loss"], 4) for r in record["conditions"]}) == 6
    pairs = [(d["context"], d["attention"], d["minus"]) for d in record["paired_differences"]]
    assert pairs == [(32, "hici", "full"), (32, "hici_s2", "full"), (64, "hici", "full"), (64, "hici_s2", "full")]
    first = record["paired_differences"][0]
    assert first["loss_difference"] == pytest.approx(
        record["conditions"][1]["mean_loss"] - record["conditions"][0]["mean_loss"]
    )
    assert "not causal" not in done.out


def test_json_says_how_the_number_was_made(
    adapter_directory, base_directory, text_file, stream, tmp_path, hici_command
):
    target = tmp_path / "a.json"
    done = hici_command("eval", "ppl", adapter_directory, "--data", text_file, "--context", 48, "--stride", 16,
                        "--max-windows", 5, "--attention", "hici", "--out", target)  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads(target.read_text())
    model = record["model"]
    assert (model["path"], model["kind"]) == (str(adapter_directory), "adapter")
    assert (model["base_model"], model["dtype"], model["device"]) == (str(base_directory), "float32", "cpu")
    assert model["base_fingerprint"].startswith("sha256:")
    assert (model["hici"]["visibility"], model["hici"]["segment_size"]) == ("past", 16)
    assert set(model["adapter_sha256"]) >= {"adapter_model.safetensors", "hici_model.safetensors", "hici_config.json"}
    file = adapter_directory / "hici_model.safetensors"
    assert model["adapter_sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (record["task"], record["seed"]) == ("perplexity", None)
    protocol = record["protocol"]
    assert (protocol["name"], protocol["stride"], protocol["max_windows"]) == ("strict", 16, 5)
    assert record["data"]["tokens"] == len(stream) - 1
    text = np.append(stream[-1:], stream[:-1])
    assert record["data"]["sha256"] == hashlib.sha256(text.astype("<i8").tobytes()).hexdigest()
    result = record["conditions"][0]
    assert (result["attention"], result["visibility"], result["segments"]) == ("hici", "past", 3)
    assert result["windows"]["available"] == 1 + -(-(len(stream) - 1 - 48) // 16)
    assert len(result["losses"]) == len(result["counts"]) == 5
    assert result["counts"] == [16] * 5
    assert {"packages", "git_revision", "time_utc", "machine"} <= set(record["provenance"])


@pytest.mark.parametrize("visibility", ["all", "current"])
def test_a_leak_stands_beside_the_number(adapter_directory, text_file, visibility, tmp_path, hici_command):
    done = hici_command("eval", "ppl", adapter_directory, "--data", text_file, "--context", 64, "--max-windows", 2,
                        "--attention", "full", "hici", "--visibility", visibility, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    full, in_hici = json.loads((tmp_path / "ppl-strict.json").read_text())["conditions"]
    assert (full["causal"], in_hici["causal"]) == (True, False)
    row = next(line for line in done.out.splitlines() if f"{in_hici['ppl']:.3f}" in line)
    assert f"hici, {visibility} (not causal)" in row
    assert "(not causal)" not in next(line for line in done.out.splitlines() if f"{full['ppl']:.3f}" in line)
    assert f"hici, {visibility} (not causal) - full" in done.out  # of the differences


def test_segments_without_slots_on_a_plain_model(base_directory, text_file, tmp_path, hici_command):
    done = hici_command("eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--attention", "full",
                        "hici", "hici_s2", "--no-slots", "--segment-size", 32, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    full, segments, s2 = json.loads((tmp_path / "ppl-strict.json").read_text())["conditions"]
    assert (segments["visibility"], segments["causal"], segments["segments"]) == (None, True, 2)
    assert len({round(r["mean_loss"], 6) for r in (full, segments, s2)}) == 3


def test_one_segment_without_slots_is_full_attention(base_directory, text_file, tmp_path, hici_command):
    hici_command("eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--attention", "full", "hici",
                 "--no-slots", "--num-segments", 1, "--out", tmp_path)  # fmt: skip
    full, segments = json.loads((tmp_path / "ppl-strict.json").read_text())["conditions"]
    assert segments["losses"] == pytest.approx(full["losses"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, changes",
    [
        (["--no-slots"], {"use_global": False, "use_local": False}),
        (["--segment-size", 24], {"segment_size": 24}),
        (["--num-segments", 2], {"num_segments": 2}),
        (["--visibility", "all"], {"visibility": "all"}),
    ],
    ids=str,
)
def test_flags_change_how_a_directory_is_used(
    flags, changes, adapter_directory, text_file, stream, tmp_path, hici_command
):
    done = hici_command("eval", "ppl", adapter_directory, "--data", text_file, "--context", 64, "--attention", "hici",
                        *flags, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    measured = json.loads((tmp_path / "ppl-strict.json").read_text())["conditions"][0]["mean_loss"]
    model = hici.from_pretrained(adapter_directory, attention="hici")
    assert measured != pytest.approx(naive_loss(model, stream, 64), abs=1e-4)
    hici.reconfigure(model, **changes)
    assert measured == pytest.approx(naive_loss(model, stream, 64), abs=1e-5)


def test_rope_is_extended_once_to_the_longest(base_directory, text_file, tmp_path, hici_command):
    arguments = ["eval", "ppl", base_directory, "--data", text_file, "--context", 64, 200, "--max-windows", 2]
    refused = hici_command(*arguments)
    assert refused.status == 2
    assert "200 tokens are more than the 128 positions" in refused.err
    assert hici_command(*arguments, "--allow-beyond-rope", "--out", tmp_path / "beyond").status == 0
    done = hici_command(*arguments, "--rope", "auto", "--out", tmp_path / "linear")
    assert done.status == 0, done.err
    assert "Rope extended (linear) to 200 positions" in done.out
    records = {name: json.loads((tmp_path / name / "ppl-strict.json").read_text()) for name in ("beyond", "linear")}
    rope = records["linear"]["model"]["rope"]
    assert (rope["extended"], rope["positions_before"], rope["positions"]) == ("linear", 128, 200)
    assert rope["rope_parameters"]["factor"] == 2.0
    assert not records["beyond"]["model"]["rope"]["extended"]
    for i in (0, 1):  # the shorter context is measured on the extended model too, and is said to be
        difference = records["linear"]["conditions"][i]["mean_loss"] - records["beyond"]["conditions"][i]["mean_loss"]
        assert abs(difference) > 1e-4


def test_nothing_is_overwritten_silently(base_directory, text_file, tmp_path, hici_command):
    arguments = ["eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--max-windows", 1, "--out"]
    (tmp_path / "ppl-strict.png").write_text("a picture")
    done = hici_command(*arguments, tmp_path)
    assert done.status == 2
    assert "nothing is overwritten silently; give another --out or --overwrite" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["ppl-strict.png"]
    assert (tmp_path / "ppl-strict.png").read_text() == "a picture"
    assert hici_command(*arguments, tmp_path, "--overwrite").status == 0
    assert json.loads((tmp_path / "ppl-strict.json").read_text())["conditions"][0]["standard_error"] is None


def test_an_out_that_cannot_be_written_is_refused(base_directory, text_file, hici_command):
    done = hici_command(
        "eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--out", f"{text_file}/a/b"
    )
    assert done.status == 2
    assert "is a file; give another place" in done.err


@pytest.mark.parametrize("name", ["ppl-strict.json", "ppl-strict.png"])
def test_a_directory_in_the_place_of_an_output_is_refused(text_file, tmp_path, name, hici_command):
    (tmp_path / name).mkdir()
    done = hici_command("eval", "ppl", "/no/such/model", "--data", text_file, "--context", 64, "--out", tmp_path,
                        "--overwrite")  # fmt: skip
    assert done.status == 2
    assert f"{name} is a directory and cannot be written as a file; give another place" in done.err


def test_the_home_directory_in_paths(base_directory, text_file, tmp_path, monkeypatch, hici_command):
    for name, target in (("base", base_directory), ("story.txt", text_file)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = hici_command("eval", "ppl", "~/base", "--data", "~/story.txt", "--context", 64, "--max-windows", 1,
                        "--out", "~/out")  # fmt: skip
    assert done.status == 0, done.err
    assert (tmp_path / "out" / "ppl-strict.json").is_file()


def test_a_token_file(base_directory, stream, text_file, tmp_path, hici_command):
    path = tmp_path / "tokens.bin"
    stream.astype("<u2").tofile(path)
    for data, out in ((path, "a.json"), (text_file, "b.json")):
        arguments = ["eval", "ppl", base_directory, "--context", 64, "--data", data, "--out", tmp_path / out,
                     "--protocol", "published"]  # fmt: skip
        assert hici_command(*arguments).status == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["data"]["sha256"] == b["data"]["sha256"]
    assert a["conditions"][0]["losses"] == b["conditions"][0]["losses"]


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("base", ["--attention", "hici", "--segment-size", 16], "fresh random ones"),
        ("base", ["--attention", "hici", "--no-slots"], "says nothing of segments; give --segment-size"),
        ("base", ["--attention", "hici_s2"], "says nothing of segments; give --segment-size"),
        ("base", ["--base-model", "x"], "is for an adapter"),
        ("base", ["--segment-size", 16], "--segment-size changes nothing in attention full"),
        ("base", ["--attention", "hici", "--segment-size", 16, "--num-segments", 2, "--no-slots"], "both given"),
        ("base", ["--device", "gpu0"], "no such device"),
        ("base", ["--attention", "full", "full"], "names one twice"),
        ("base", ["--context", 64, 64], "names one twice"),
        ("base", ["--stride", 65], "--stride 65 is larger than the window of 64"),
        ("base", ["--context", 5000, "--allow-beyond-rope"], "fewer than one window of 5000"),
        ("base", ["--data", "nothing/*.txt"], "does not exist, and as a glob it matches no file"),
        ("adapter", ["--attention", "hici", "--no-slots", "--visibility", "past"], "there is no slot to see"),
        ("adapter", ["--attention", "hicy"], "Did you mean 'hici'?"),
        ("/no/such/model", [], "does not exist, and it is no hub name"),
        ("nobody/nothing", [], "no model 'nobody/nothing'"),
    ],
    ids=str,
)
def test_refusals(model, arguments, message, base_directory, adapter_directory, text_file, tmp_path, hici_command):
    model = {"base": base_directory, "adapter": adapter_directory}.get(model, model)
    rest = [] if "--data" in arguments else ["--data", text_file]
    rest += [] if "--context" in arguments else ["--context", 64]
    done = hici_command("eval", "ppl", model, *rest, *arguments, "--out", tmp_path / "out")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused(base_directory, text_file, tmp_path, hici_command):
    from safetensors.torch import load_file, save_file

    for file in base_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base_directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = hici_command("eval", "ppl", tmp_path, "--data", text_file, "--context", 64)
    assert done.status == 2
    assert "lacks 1 weights" in done.err
    assert "model.layers.1.mlp.up_proj.weight" in done.err


def test_hici_weights_in_a_checkpoint_are_not_dropped(base_directory, tokenizer, text_file, tmp_path, hici_command):
    from transformers import AutoModelForCausalLM

    model = hici.attach(AutoModelForCausalLM.from_pretrained(base_directory), hici.HiCIConfig(bottleneck_dim=64))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = hici_command("eval", "ppl", tmp_path, "--data", text_file, "--context", 64, "--attention", "full", "hici",
                        "--out", tmp_path / "r.json")  # fmt: skip
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "r.json").read_text())["model"]["kind"] == "merged"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hici"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = hici_command("eval", "ppl", tmp_path, "--data", text_file, "--context", 64)
    assert done.status == 2
    assert "holds HiCI modules inside a plain checkpoint, which would be dropped" in done.err


def test_bfloat16_is_close(base_directory, text_file, tmp_path, hici_command):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        target = tmp_path / f"{dtype}.json"
        hici_command("eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--dtype", dtype,
                     "--threads", 1, "--out", target)  # fmt: skip
        record = json.loads(target.read_text())
        assert record["model"]["dtype"] == dtype
        losses[dtype] = record["conditions"][0]["mean_loss"]
    assert math.isclose(losses["float32"], losses["bfloat16"], rel_tol=0.02)
    assert losses["float32"] != losses["bfloat16"]


@pytest.mark.parametrize("protocol", ["published", "position"])
def test_the_other_protocols(protocol, adapter_directory, text_file, stream, tmp_path, hici_command):
    done = hici_command("eval", "ppl", adapter_directory, "--data", text_file, "--context", 64, "--protocol", protocol,
                        "--attention", "full", "hici", "--max-windows", 3, "--out", tmp_path)  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads((tmp_path / f"ppl-{protocol}.json").read_text())
    assert (tmp_path / f"ppl-{protocol}.png").read_bytes().startswith(b"\x89PNG")
    assert f"protocol {protocol}" in done.out
    assert record["data"]["sha256"] == hashlib.sha256(stream.astype("<i8").tobytes()).hexdigest()
    first = record["conditions"][0]
    assert first["windows"]["stride"] == 64  # published: 256, but no more than the context
    assert ("bins" in first) == (protocol == "position")


def test_a_token_file_with_ids_beyond_the_vocabulary(base_directory, stream, tmp_path, hici_command):
    path = tmp_path / "tokens.bin"
    ids = stream.astype("<u2")
    ids[100] = 5000
    ids.tofile(path)
    done = hici_command("eval", "ppl", base_directory, "--data", path, "--context", 64)
    assert (done.status, done.out) == (2, "")
    assert "5000" in done.err
    assert "vocabulary" in done.err


def test_the_same_command_again_is_the_same_measurement(base_directory, text_file, tmp_path, hici_command):
    """Also where a plain model gets modules for its segments, which nothing reads: they are drawn anew each time."""
    arguments = ["eval", "ppl", base_directory, "--data", text_file, "--context", 64, "--attention", "hici",
                 "--no-slots", "--segment-size", 32, "--out", tmp_path]  # fmt: skip
    first = hici_command(*arguments)
    again = hici_command(*arguments)
    assert (first.status, again.status) == (0, 0), again.err
    assert "holds this very measurement already; nothing is measured again" in again.err
    assert again.out == first.out


def command_line(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "hici", *map(str, arguments)]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_result(
    processes, adapter_directory, text_file, tmp_path, hici_command
):
    arguments = ["eval", "ppl", adapter_directory, "--data", text_file, "--context", 32, "--stride", 4,
                 "--attention", "full", "hici", "--threads", 1, "--out"]  # fmt: skip
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    journal = tmp_path / "killed.partial-0.jsonl"
    with subprocess.Popen(command_line(*arguments, killed, processes=processes), stderr=subprocess.DEVNULL) as process:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 40:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        # a launcher that is killed leaves its processes behind, which would end the work
        process.send_signal(signal.SIGKILL if processes == 1 else signal.SIGTERM)
    assert not killed.exists()
    done = subprocess.run(
        command_line(*arguments, killed, processes=processes), capture_output=True, text=True, check=True
    )
    assert "parts were measured before; going on" in done.stderr
    assert hici_command(*arguments, whole).status == 0
    results = [json.loads(path.read_text()) for path in (killed, whole)]
    timing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    for result in results:
        del result["provenance"], result["processes"]
        result["conditions"] = [{k: v for k, v in c.items() if k not in timing} for c in result["conditions"]]
    assert results[0] == results[1]
    assert not list(tmp_path.glob("*.jsonl"))
