"""PeftModel.from_pretrained beside the drop-in: what holds no HiCI is PEFT's, untouched."""

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import difference, logits, random_ids


def stock_from_pretrained(*args, **kwargs):
    """PEFT's own, below the wrapper."""
    return PeftModel.from_pretrained.__func__.__wrapped__(PeftModel, *args, **kwargs)


@pytest.fixture
def ordinary(checkpoint, tmp_path):
    """An ordinary LoRA adapter for the golden base."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=r".*self_attn\.q_proj", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "ordinary-16k")
    return tmp_path / "ordinary-16k"


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"adapter_name": "mine", "low_cpu_mem_usage": True}])
def test_an_ordinary_adapter_loads_as_without_the_drop_in(registered, checkpoint, ordinary, options):
    torch.manual_seed(0)
    one, other = registered(), registered()
    other.load_state_dict(one.state_dict())
    plain = [AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32) for _ in range(2)]
    for first, second in ((one, other), plain):
        loaded = PeftModel.from_pretrained(first, ordinary, **options)
        expected = stock_from_pretrained(second, ordinary, **options)
        assert type(loaded) is type(expected)
        ours, theirs = (dict(model.named_parameters()) for model in (loaded, expected))
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            assert torch.equal(ours[name], parameter)
            assert ours[name].requires_grad == parameter.requires_grad
        assert loaded.config.rope_parameters == expected.config.rope_parameters
        assert loaded.config.vocab_size == 97
        assert difference(logits(loaded, random_ids(2, 16)), logits(expected, random_ids(2, 16))) == 0


def test_its_errors_are_pefts(registered, tmp_path, ordinary):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
            PeftModel.from_pretrained(registered(), str(directory))
    with pytest.raises(TypeError, match="model_id"):
        PeftModel.from_pretrained(registered())
    (ordinary / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match="(?i)header"):
        PeftModel.from_pretrained(registered(), ordinary)


def test_a_longlora_adapter_is_left_to_peft(registered, adapter):
    for file in ("adapter_model.bin", "trainable_params.bin"):
        tensors = torch.load(adapter / file, weights_only=True)
        plain = {n: t for n, t in tensors.items() if "local_constructor" not in n and "global_integrator" not in n}
        torch.save(plain, adapter / file)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):  # its targets match the HiCI projections too
        model = PeftModel.from_pretrained(registered(), adapter)
    assert model.config.vocab_size == 97


def test_plain_peft_loses_most_of_a_hici_directory_in_silence(registered, checkpoint, recwarn):
    """Why registered bases are treated apart: no error about the vocabulary, and no warning."""
    registered()  # the wrapper is in place
    base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    embeddings = base.get_input_embeddings().weight.clone()
    model = PeftModel.from_pretrained(base, checkpoint / "peft_fp32")
    assert not [w for w in recwarn.list if "key" in str(w.message)]
    assert model.get_input_embeddings().weight.shape[0] == 97
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert len([name for name, _ in model.named_parameters() if ".lora_" in name]) == 16  # of 48
    assert model.config.rope_parameters["rope_type"] == "default"


def test_an_ordinary_hub_adapter_is_left_to_peft(registered, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    asked = []

    def unreachable(self, name, revision=None):
        asked.append((name, revision))
        raise HTTPError("no network")

    monkeypatch.setattr(HfApi, "list_repo_files", unreachable)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'owner/name'"):
        PeftModel.from_pretrained(registered(), "owner/name", revision="v1")
    assert asked == [("owner/name", "v1")]
