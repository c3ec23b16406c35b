"""A HiCICache in a file: the same logits afterwards, and what is refused."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hici
from helpers import cut, difference, logits, padded, random_ids, randomise, read, small_config, strong_model, tiny_model
from hici import HiCICache, reconfigure
from hici.models.cache_file import FORMAT_VERSION, read_about

DOCUMENT = 29
RAGGED = (29, 17, 8, 1)


@pytest.fixture(scope="module")
def model():
    return strong_model(visibility="past")


@pytest.fixture
def file(model, tmp_path):
    """A file of `DOCUMENT` tokens of one row."""
    return _filled(model, random_ids(1, DOCUMENT)).save(tmp_path / "document.safetensors")


def _filled(model, ids, mask=None):
    cache = HiCICache(model)
    read(model, cache, ids, cut(ids.shape[1], [5, 20]), mask)
    return cache


def _batch(kind):
    if kind == "uniform":
        return random_ids(2, DOCUMENT), torch.ones(2, DOCUMENT, dtype=torch.long)
    if kind == "at-a-border":
        return random_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    if kind == "short":
        return random_ids(1, 3), torch.ones(1, 3, dtype=torch.long)
    return padded([random_ids(1, length, seed=length)[0] for length in RAGGED], "left")


def _assert_goes_on(model, cache, ids, mask=None):
    new = random_ids(ids.shape[0], 21, seed=7)
    begin, ids = ids.shape[1], torch.cat((ids, new), dim=1)
    mask = None if mask is None else torch.cat((mask, torch.ones_like(new)), dim=1)
    out = read(model, cache, ids, [(begin + a, begin + b) for a, b in cut(21, [1, 6])], mask)
    assert difference(out, logits(model, ids, mask)[:, begin:]) < 1e-5


@pytest.mark.parametrize("kind", ["uniform", "ragged", "at-a-border", "short"])
def test_round_trip(model, tmp_path, kind):
    ids, mask = _batch(kind)
    cache = _filled(model, ids, mask)
    path = cache.save(str(tmp_path / "a.safetensors"))
    assert path == tmp_path / "a.safetensors"
    loaded = HiCICache.load(path, model)
    assert (loaded.tokens, loaded.get_seq_length()) == (cache.tokens, cache.get_seq_length())
    _assert_goes_on(model, loaded, ids, mask)
    _assert_goes_on(model, cache, ids, mask)  # saving changed nothing
    assert [x.name for x in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "changes", [{"use_local": False}, {"use_global": False}, {"use_global": False, "use_local": False}], ids=str
)
def test_round_trip_of_other_slots(tmp_path, changes):
    model = strong_model(visibility="past", **changes)
    ids, mask = _batch("ragged")
    path = _filled(model, ids, mask).save(tmp_path / "a.safetensors")
    _assert_goes_on(model, HiCICache.load(path, model), ids, mask)


@pytest.mark.parametrize("way", ["bfloat16", "lora", "deepcopy"])
def test_round_trip_with_other_models(tmp_path, way):
    model = hici.attach(tiny_model(), small_config(visibility="past"))
    model = hici.add_lora(model).eval() if way == "lora" else model
    randomise(model)
    ids = random_ids(1, DOCUMENT)
    if way == "bfloat16":
        model.to(torch.bfloat16)
    cache = _filled(model, ids)
    path = cache.save(tmp_path / "a.safetensors")
    reader = copy.deepcopy(model) if way == "deepcopy" else model
    loaded, new = HiCICache.load(path, reader), random_ids(1, 21, seed=7)
    assert torch.equal(read(reader, loaded, new, [(0, 21)]), read(model, cache, new, [(0, 21)]))


def test_a_file_is_read_on_in_generate(model, file):
    ids = torch.cat((random_ids(1, DOCUMENT), random_ids(1, 4, seed=5)), dim=1)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, past_key_values=HiCICache.load(file, model), **settings), expected)


def test_another_backend_reads_it(model, file):
    reader = strong_model(visibility="past", backend="reference")
    _assert_goes_on(reader, HiCICache.load(file, reader), random_ids(1, DOCUMENT))


def test_about(model, tmp_path):
    cache = _filled(model, random_ids(1, DOCUMENT))
    about = {"document": "book.txt", "words": [1, 2, {"three": None}]}
    cache.save(tmp_path / "a.safetensors", about=about)
    assert read_about(tmp_path / "a.safetensors") == about
    cache.save(tmp_path / "a.safetensors", overwrite=True)
    assert read_about(tmp_path / "a.safetensors") == {}


def test_it_allows_more_than_the_rope(model, file):
    assert HiCICache.load(file, model, allow_beyond_rope=True).allow_beyond_rope
    assert not HiCICache.load(file, model).allow_beyond_rope


def test_it_is_small_whatever_was_read(model, tmp_path):
    sizes = []
    for length in (19, 123):
        sizes.append(_filled(model, random_ids(1, length)).save(tmp_path / f"{length}.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 100


# ---- refused: saving


def test_nothing_is_overwritten(model, file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"document\.safetensors exists, and nothing is overwritten silently; give an"):
        _filled(model, random_ids(1, 9)).save(file)
    assert file.read_bytes() == before


def test_an_empty_cache(model, tmp_path):
    with pytest.raises(ValueError, match="the HiCICache is empty; read something with it before saving it"):
        HiCICache(model).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_about_that_is_no_json(model, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        _filled(model, random_ids(1, 9)).save(tmp_path / "a.safetensors", about={"model": model})
    assert not list(tmp_path.iterdir())


def test_the_model_is_gone(tmp_path):
    model = strong_model(visibility="past")
    cache = _filled(model, random_ids(1, 9))
    del model
    with pytest.raises(ValueError, match="the model of this HiCICache is gone; keep it while the cache is in use"):
        cache.save(tmp_path / "a.safetensors")


# ---- refused: loading


def _rewrite(path, change):
    """Change the metadata's values and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["hici_cache"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    change(values, tensors)
    save_file(tensors, path, metadata={"hici_cache": json.dumps(values)})


def _assert_refused(path, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        HiCICache.load(path, model)
    assert str(path) in str(caught.value)


def test_no_file(model, tmp_path):
    _assert_refused(tmp_path / "none", model, "does not exist; it should be a file that HiCICache.save wrote")
    _assert_refused(tmp_path, model, "does not exist; it should be a file")


@pytest.mark.parametrize("content", [b"", b"no tensors at all" * 9], ids=["empty", "text"])
def test_no_safetensors_file(model, tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    _assert_refused(tmp_path / "a", model, r"is damaged or no safetensors file \(.*\); copy it again")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        read_about(tmp_path / "a")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file(model, file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    _assert_refused(file, model, r"is damaged or no safetensors file \(.*\); copy it again")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "other"])
def test_another_safetensors_file(model, tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a", metadata=metadata)
    _assert_refused(
        tmp_path / "a", model, r"is no HiCICache \(its metadata lacks hici_cache\); give a file that HiCICa"
    )


def test_another_version(model, file):
    _rewrite(file, lambda values, tensors: values.update(format_version=FORMAT_VERSION + 1))
    message = r"has format_version 2, but this hici reads 1; install the hici that wrote it, or"
    _assert_refused(file, model, message)


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.local_constructor.k_proj", "self_attn.k_proj"])
def test_another_model(model, file, part):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].get_submodule(part).weight.mul_(1.1)
    _assert_refused(file, other, r"was made with another model \(other weights or rope\); load that model, or read the")


def test_another_rope(model, file):
    other = copy.deepcopy(model)
    hici.extend_rope(other, 512)
    assert other.config.rope_parameters != model.config.rope_parameters
    _assert_refused(file, other, r"was made with another model \(other weights or rope\)")


def test_another_config(model, file):
    other = reconfigure(copy.deepcopy(model), segment_size=16)
    _assert_refused(file, other, "was made with segment_size=8, but the model has 16; reconfigure the model, or read")
    other = reconfigure(copy.deepcopy(model), use_local=False)
    _assert_refused(file, other, "was made with use_local=True, but the model has False; reconfigure the model, or")


def test_another_dtype(model, file):
    other = copy.deepcopy(model).to(torch.bfloat16)
    message = (
        r"was made in torch.float32, but the model is in torch.bfloat16; load the model with dtype=torch.float32, or "
    )
    _assert_refused(file, other, message)


@pytest.mark.parametrize("name", ["keys", "values", "highest_BhM", "context_BhMd", "segments_1", "squares_D"])
def test_a_missing_tensor(model, file, name):
    _rewrite(file, lambda values, tensors: tensors.pop(f"layers.1.{name}"))
    _assert_refused(file, model, rf"lacks {name} of layer 1; copy it again")


@pytest.mark.parametrize("group", ["BhM", "_D"])
def test_missing_groups(model, file, group):
    def drop(values, tensors):
        for name in [n for n in tensors if n.startswith("layers.0.") and (group in n or n.endswith("segments_1"))]:
            del tensors[name]

    _rewrite(file, drop)
    _assert_refused(file, model, r"lacks .* of layer 0; copy it again")


def test_another_number_of_layers(model, file):
    _rewrite(file, lambda values, tensors: values.update(layers=3))
    _assert_refused(file, model, r"has 3 layers, but the model has 2; copy it again")


def test_a_model_that_has_no_cache(model, file):
    with pytest.raises(ValueError, match=re.escape("visibility='all' with a HiCICache")):
        HiCICache.load(file, strong_model())


def test_changed_data(model, tmp_path):
    """One bit of one tensor."""
    file = tmp_path / "document.safetensors"
    cache = HiCICache(model)
    read(model, cache, random_ids(2, 21), [(0, 21)])
    cache.save(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(its tensors are not those that were written\); copy it again"):
        HiCICache.load(file, model)
